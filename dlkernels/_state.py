"""The one switch: see dlkernels.disabled()."""

enabled = True
