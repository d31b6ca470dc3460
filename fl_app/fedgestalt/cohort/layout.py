"""Names of files and columns in the layout of GestaltMatcher DB (GMDB).

::

    gmdb_metadata/gmdb_{train,val,test}_images_VERSION.csv        image_id, subject, label
                  gmdb_frequent_{gallery,test}_images_VERSION.csv  image_id, subject, label
                  gmdb_rare_{gallery,test}_images_VERSION.csv      image_id, subject, label, split
                  gmdb_unsolved_images_VERSION.csv                 image_id, subject
                  gmdb_syndromes_VERSION.tsv                       syndrome_id, syndrome_name, ...
                  image_metadata_VERSION.tsv                       image_id, present_features, ...
                  lookup_table_VERSION.txt                         one line, then a JSON list
    gmdb_align/IMAGE_ID_rot_aligned.jpg                            aligned face, 112 x 112

The file of unsolved cases, patients without a diagnosis, is ours and may be missing.
"""

from __future__ import annotations

from pathlib import Path
from typing import Final

METADATA: Final = "gmdb_metadata"
IMAGES: Final = "gmdb_align"
FREQUENT_FILES: Final = ("train", "val", "test", "frequent_gallery", "frequent_test")
RARE_FILES: Final = ("rare_gallery", "rare_test")
UNSOLVED_FILE: Final = "unsolved"
UNSOLVED_COLUMNS: Final = ("image_id", "subject")
IMAGE_COLUMNS: Final = ("image_id", "subject", "label")
SYNDROME_COLUMNS: Final = (
    "syndrome_id",
    "syndrome_name",
    "image_ids",
    "num_of_subjects",
    "num_of_images",
)
METADATA_COLUMNS: Final = (
    "image_id",
    "patient_id",
    "internal_syndrome_id",
    "internal_syndrome_name",
    "disorder_names",
    "omim_ids",
    "gene_names",
    "present_features",
    "gender",
    "age_year",
    "age_month",
    "ethnicity",
    "image_type",
)
# The columns that other fields of a record already say.
_DERIVED: Final = (*METADATA_COLUMNS[:4], "present_features")
FACT_COLUMNS: Final = tuple(c for c in METADATA_COLUMNS if c not in _DERIVED)


def image_file(root: Path, image_id: str) -> Path:
    """Where a cohort folder keeps the aligned face of an image."""
    return root / IMAGES / f"{image_id}_rot_aligned.jpg"
