"""Faster R-CNN on any network, as torchvision defines it (paper § 5.3, Table 6, right).

Everything has a static shape, so that an update is one program: boxes are padded, and what is
padding is marked; proposals are the best of a fixed number.
"""
