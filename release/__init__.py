"""What the authors published (tonyckc/TABOM, May 2026): trajectory files, recipes, the paper's tables."""

from release.files import to_release_format
from runs import disk

METHODS = {"confidence": "default", "margin": "topk_margin"}  # what the authors' files call our strategies


def write(out, records, settings, loaded):
    """Write records to out/release.jsonl, as the authors' trainer reads them. settings: of the decoder."""
    method = METHODS.get(settings["strategy"], settings["strategy"])
    with disk.atomic_file(out / "release.jsonl") as f:
        for record in records:
            f.write(disk.json_line(to_release_format(record, loaded.m.config.pad_id, method)))
