"""The layer on NVIDIA Hopper, in Gluon and Triton."""
