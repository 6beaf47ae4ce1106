"""The executor: any architecture of a bucket as data to one compiled program."""
