"""The arrangements in which kernels read expert weights: one file a layout, host pack and unpack with the in-kernel inverse beside them."""
