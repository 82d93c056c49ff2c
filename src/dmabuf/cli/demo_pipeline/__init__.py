"""What `dmabuf demo` runs: four processes on one video, whose frames go round rings of buffers by fences alone.

``ring``: the protocol. ``video``: decoding, the filter, the histogram, encoding. ``counters``: what the stages tell the parent.
``stage``: the program of a stage. ``run``: the parent's side.
"""
