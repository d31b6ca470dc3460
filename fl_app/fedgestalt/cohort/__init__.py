"""The records and images that a site holds: read, checked, split, built, cached."""

from fedgestalt.cohort.cache import default_cache, materialise
from fedgestalt.cohort.check import Counts, FaceFinder, check_cohort, check_table, counts_of
from fedgestalt.cohort.encodings import (
    EncodingPart,
    EncodingTable,
    read_encodings,
    write_encodings,
)
from fedgestalt.cohort.export import export_cohort
from fedgestalt.cohort.gmdb import read_cohort, write_cohort
from fedgestalt.cohort.images import load_image, read_photograph, save_jpeg
from fedgestalt.cohort.labels import LabelMap, differences, label_map_of, read_label_map
from fedgestalt.cohort.layout import image_file
from fedgestalt.cohort.records import UNSOLVED, Cohort, ImageRecord, RareSplit, Syndrome
from fedgestalt.cohort.simple import import_csv
from fedgestalt.cohort.splits import STRATEGIES, split_cohort, write_silos
from fedgestalt.cohort.tables import Finding

__all__ = [
    "STRATEGIES",
    "UNSOLVED",
    "Cohort",
    "Counts",
    "EncodingPart",
    "EncodingTable",
    "FaceFinder",
    "Finding",
    "ImageRecord",
    "LabelMap",
    "RareSplit",
    "Syndrome",
    "check_cohort",
    "check_table",
    "counts_of",
    "default_cache",
    "differences",
    "export_cohort",
    "image_file",
    "import_csv",
    "label_map_of",
    "load_image",
    "materialise",
    "read_cohort",
    "read_encodings",
    "read_label_map",
    "read_photograph",
    "save_jpeg",
    "split_cohort",
    "write_cohort",
    "write_encodings",
    "write_silos",
]
