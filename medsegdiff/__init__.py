"""MedSegDiff: diffusion segmentation of medical images, useful without any federation."""

import os

# Idle OpenMP threads that spin steal the cores they wait for: beside one busy process a two-thread training step took
# 4.5 s with spinning threads and 0.5 s with sleeping ones. Read once, when torch is loaded; the user's own value wins.
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
