"""A small sound cohort folder that tests then damage."""

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from fedgestalt.cohort.images import save_jpeg

LISTINGS = {
    "train": "1,meier,7\n2,schulz,9\n",
    "val": "3,weber,7\n",
    "test": "4,huber,7\n5,lang,9\n",
    "frequent_gallery": "1,meier,7\n2,schulz,9\n3,weber,7\n",
    "frequent_test": "4,huber,7\n5,lang,9\n",
    "rare_gallery": "6,wolf,30,0\n7,kern,30,1\n",
    "rare_test": "7,kern,30,0\n6,wolf,30,1\n",
}
SYNDROMES = "7\tSeven\t[1, 3, 4]\t3\t3\n9\tNine\t[2, 5]\t2\t2\n30\tThirty\t[6, 7]\t2\t2\n"


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Seven images of seven subjects; syndromes 9 and 7 are frequent, 30 is rare."""
    root = tmp_path / "hospital"
    metadata, images = root / "gmdb_metadata", root / "gmdb_align"
    metadata.mkdir(parents=True)
    images.mkdir()
    for kind, rows in LISTINGS.items():
        split = ",split" if kind.startswith("rare") else ""
        text = f"image_id,subject,label{split}\n{rows}"
        (metadata / f"gmdb_{kind}_images_v1.csv").write_text(text)
    header = "syndrome_id\tsyndrome_name\timage_ids\tnum_of_subjects\tnum_of_images\n"
    (metadata / "gmdb_syndromes_v1.tsv").write_text(header + SYNDROMES)
    (metadata / "image_metadata_v1.tsv").write_text(
        "image_id\tpresent_features\tomim\tgender\n1\tHP:0000154;HP:0000343\t122470\tfemale\n2\t\t\t\n"
    )
    (metadata / "lookup_table_v1.txt").write_text("class to syndrome\n[9, 7]\n")
    rng = np.random.default_rng(0)
    for image_id in range(1, 8):
        pixels = rng.integers(0, 256, (112, 112, 3), np.uint8)
        save_jpeg(images / f"{image_id}_rot_aligned.jpg", pixels)
    return root


@pytest.fixture
def edit(folder: Path) -> Callable[[str, str, str], None]:
    """Replace text in a metadata file."""

    def replace(name: str, old: str, new: str) -> None:
        path = folder / "gmdb_metadata" / name
        text = path.read_text()
        assert old in text
        path.write_text(text.replace(old, new, 1))

    return replace
