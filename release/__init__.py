"""The authors' published code and data (tonyckc/TABOM) beside ours:

release.files     their trajectory files, read and written
"""
