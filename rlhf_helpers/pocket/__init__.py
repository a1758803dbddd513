"""The embedded world that lets the course run with no network: facts, text, rubric, annotator."""
