"""MedSegDiff: diffusion segmentation of medical images, useful without any federation."""

import os

# How long an idle OpenMP thread spins before it sleeps: 10,000 turns are some 30 microseconds, enough for the next
# small operation to find it awake. Threads that spin on steal the cores they wait for (4.5 s a step beside one busy
# process instead of 0.8), threads that sleep at once are woken hundreds of times a step (0.33 s instead of 0.22 on idle
# cores). Read once, when torch is loaded; the user's own choice wins.
if "OMP_WAIT_POLICY" not in os.environ:
    os.environ.setdefault("GOMP_SPINCOUNT", "10000")
