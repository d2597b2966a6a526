"""Every op in plain torch: the definitions. Exact and device-independent first, fast second."""
