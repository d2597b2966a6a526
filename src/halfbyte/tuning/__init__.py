"""Which configuration of a kernel is fastest here: races, and the tables of what won them, which `kernels.tuned` reads.

models     the layers that the package brings tables of
layer      a layer by its sizes
search     what is raced, and what wins
compiling  kernels compiled in processes, without the device
race       times on the device; marshal  in a process that may hang
store      the user's tables
run        all of it, for several layers; session  for what a program calls
"""
