"""The records and images that a site holds: read, checked, split, built, cached."""

from fedgestalt.cohort.cache import default_cache, materialise
from fedgestalt.cohort.check import check_cohort
from fedgestalt.cohort.encodings import (
    EncodingPart,
    EncodingTable,
    read_encodings,
    write_encodings,
)
from fedgestalt.cohort.gmdb import read_cohort, write_cohort
from fedgestalt.cohort.images import load_image, read_photograph, save_jpeg
from fedgestalt.cohort.layout import image_file
from fedgestalt.cohort.records import UNSOLVED, Cohort, ImageRecord, RareSplit, Syndrome
from fedgestalt.cohort.simple import import_csv
from fedgestalt.cohort.splits import STRATEGIES, split_cohort, write_silos
from fedgestalt.cohort.tables import Finding

__all__ = [
    "STRATEGIES",
    "UNSOLVED",
    "Cohort",
    "EncodingPart",
    "EncodingTable",
    "Finding",
    "ImageRecord",
    "RareSplit",
    "Syndrome",
    "check_cohort",
    "default_cache",
    "image_file",
    "import_csv",
    "load_image",
    "materialise",
    "read_cohort",
    "read_encodings",
    "read_photograph",
    "save_jpeg",
    "split_cohort",
    "write_cohort",
    "write_encodings",
    "write_silos",
]
