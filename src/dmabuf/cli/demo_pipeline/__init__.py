"""The program of `dmabuf demo`: four processes on one video, whose frames pass through rings of buffers by fences alone.

``ring``: the protocol. ``video``: decoding, the filter, the histogram, encoding. ``counters``: the stages' numbers for the parent.
``stage``: the program of a stage. ``run``: the parent's side.
"""
