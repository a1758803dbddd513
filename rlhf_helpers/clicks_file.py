"""A file of JSON lines that a kill leaves whole: what `clicks` saves each choice with."""

import json
import os
from pathlib import Path

from rlhf_helpers.checkpoints import require_no_file
from rlhf_helpers.guards import shown
from rlhf_helpers.validation import checked


class RowFile:
    """JSON lines; each change writes all of them under another name, then renames that file.

    Args:
        path: ends in .jsonl. The folders above it are made.

    Raises:
        TypeError: for what is no path.
        ValueError: for another ending.
        OSError: if the file could not be written.

    Example:
        >>> import tempfile
        >>> file = RowFile(Path(tempfile.mkdtemp()) / "rows.jsonl")
        >>> file.write([{"side": "first"}])
        >>> RowFile(file.path).rows()
        [{'side': 'first'}]
    """

    @checked
    def __init__(self, path: str | Path) -> None:
        self.path = Path(path).expanduser().resolve()  # renaming must not replace a link
        if self.path.suffix != ".jsonl":
            raise ValueError(f"path is '{path}'; give one that ends in .jsonl")
        require_no_file(self.path.parent)
        self._part = self.path.with_name(self.path.name + ".part")
        try:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            self._content = self._read()
            if self.path.exists() and not os.access(self.path, os.W_OK):
                raise PermissionError("it is write-protected")
            self._part.touch()
            self._part.unlink()
        except OSError as error:
            raise OSError(
                f"'{path}' cannot be written ({error}); mend its rights, or give another path"
            ) from error

    def changed(self) -> bool:
        """Whether the file is not as this object has last read or written it."""
        return self._read() != self._content

    def rows(self) -> list[dict]:
        """The rows as last read or written.

        A last line that was cut, as by a full disk or a copy that broke off, is left out, and a
        line says so. It begins as a row and has no end.

        Raises:
            ValueError: for another line that is no JSON object, with its number.
        """
        lines = self._content.rstrip(b"\n").split(b"\n") if self._content else []
        rows = []
        for number, line in enumerate(lines, 1):
            try:
                row = json.loads(line)
                if not isinstance(row, dict):
                    raise ValueError("it is no row in braces")
                rows.append(row)
            except ValueError as error:
                cut = number == len(lines) and line.startswith(b"{")
                if not cut or self._content.endswith(b"\n"):
                    raise ValueError(
                        f"'{self.path}', line {number}, is damaged ({error}); mend or remove that "
                        "line, or give another path"
                    ) from error
                print(f"'{self.path}': its last line, {number}, is cut and was left out")
        return rows

    def write(self, rows: list[dict]) -> None:
        """Make these the rows of the file.

        Raises:
            TypeError: for rows that are no dictionaries, or hold what JSON has not.
            OSError: if that fails; the file is then as it was.
        """
        try:
            lines = [json.dumps(dict(row), ensure_ascii=False) for row in rows]
            content = "".join(line + "\n" for line in lines).encode()
        except (TypeError, ValueError) as error:
            raise TypeError(
                f"rows is {shown(rows)}, not all of it JSON ({error}); give a list of dictionaries "
                "of texts and numbers"
            ) from error
        try:
            with self._part.open("wb") as part:
                part.write(content)
                part.flush()
                os.fsync(part.fileno())
            os.replace(self._part, self.path)
        except OSError as error:
            raise OSError(
                f"'{self.path}' cannot be written ({error}); what was saved before is there. Make "
                "room, or mend its rights, and try again"
            ) from error
        self._content = content

    def _read(self) -> bytes:
        return self.path.read_bytes() if self.path.exists() else b""
