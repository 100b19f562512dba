import os

# oneDNN keeps a compiled kernel for each of the last 1,024 shapes it saw. Speech has many shapes:
# on CPU that is half a gigabyte in every process, and no faster.
os.environ.setdefault("ONEDNN_PRIMITIVE_CACHE_CAPACITY", "128")

__version__ = "0.2.0"
