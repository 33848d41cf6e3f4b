"""segcloud: CT scans in object storage to a trained segmentation model to masks in object storage."""

__version__ = "0.1.0"
