"""Every Triton kernel compiled with every tile for every target, without a GPU: `make matrix`.

matrix     what is compiled and what it uses; kept in matrix.csv
traffic    bytes that a program moves in a step, by the strict interpreter; kept in traffic.csv
page       compile-matrix.md, written from both
"""
