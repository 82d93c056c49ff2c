"""Pipelines of processes that are joined by streams (docs/pipe.md): what ``dmabuf pipe`` and ``dmabuf demo`` run.

``words``: the command line. ``plan``: what it means, checked. ``run``: the parent, which starts and watches the stages. ``stage``: the
program of a stage. ``inputs`` and ``output``: its ends of streams. ``function``: how a user's function is called. ``sources``, ``sinks``:
where frames come from and go. ``board``: the stages' numbers. ``line``: the messages between the parent and a stage.
"""
