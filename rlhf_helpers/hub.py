"""Loading from a folder or the hub, with errors that say what to do."""

from pathlib import Path

from rlhf_helpers.presets import Preset


def require_files(folder: Path, *names: str) -> None:
    """Raise FileNotFoundError, saying how to mend it, unless the folder has all these files."""
    if missing := [name for name in names if not (folder / name).is_file()]:
        raise FileNotFoundError(
            f"{folder / missing[0]} is missing; reinstall rlhf_helpers, or, if this is a folder of "
            "your own, save a model and its tokenizer there with save_pretrained"
        )


def from_hub(source: str, load, *args, **kwargs):
    """Call a loader of a folder or hub id; if it fails, say what to do instead."""
    try:
        return load(*args, **kwargs)
    except Exception as error:
        detail = f"{type(error).__name__}: {str(error).strip().partition(chr(10))[0]}"
        if Path(source).is_dir():
            raise ValueError(
                f"{source!r} cannot be loaded ({detail}); if a file is missing, truncated or "
                "damaged, reinstall rlhf_helpers, or save model and tokenizer again"
            ) from error
        if not isinstance(error, OSError):
            raise
        raise ConnectionError(
            f"{source!r} is no local path, and the hub did not give it ({detail}); check the name "
            "and the network, accept its licence on its page and log in with `hf auth login` if it "
            "has one, or download it elsewhere and pass the local folder"
        ) from error


def load_pretrained(preset: Preset, load, **options):
    """Call a `from_pretrained` for the preset's model; no code of the model's author is run."""
    options |= {"revision": preset.revision, "local_files_only": preset.offline}
    options["trust_remote_code"] = False  # else transformers would ask whether to run it
    return from_hub(preset.model, load, preset.model, **options)
