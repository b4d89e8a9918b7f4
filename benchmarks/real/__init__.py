"""Training on real data, in pieces, beside MONAI's DynUNet: see train.py."""
