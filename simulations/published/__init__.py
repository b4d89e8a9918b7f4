"""Published datasets, from the layout they are distributed in to cases.csv and dataset.yaml."""
