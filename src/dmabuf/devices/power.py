"""``Powered``: what a queue of jobs needs to know of its device.

A device that loses its power ends every pending job with -ENODEV. ``epoch`` counts the losses: a job belongs to the epoch in which it was
submitted, so that it ends even when the power comes back before the job is looked at.
"""

from __future__ import annotations

import errno

from dmabuf.core.memory.device import Device
from dmabuf.devices.janitor import Janitor
from dmabuf.domain.domain import Domain
from dmabuf.errors import fail


class Powered:
    """A device with power, a janitor and an end. ``driver``: the driver name of its timelines."""

    driver = "dmabuf"

    def __init__(self, device: Device, domain: Domain) -> None:
        self.device, self.domain = device, domain
        self.powered, self.epoch, self.closed = True, 0, False
        self.janitor = Janitor(device.name)
        domain.join()
        self._life = domain.shm.life

    @property
    def inherited(self) -> bool:
        """Whether this is the copy of a forked child, which does nothing."""
        return self.domain.shm.life != self._life

    def check_usable(self, operation: str) -> None:
        """Check that the device can be used here.

        Raises:
            NotPermittedError: This process is a forked child, and the device is its parent's (EPERM).
            ClosedError: The device is closed (EBADF).
        """
        if self.inherited:
            raise fail(errno.EPERM, operation, self, "make a device in this process", what="a forked child can't use its parent's device")
        if self.closed:
            raise fail(errno.EBADF, operation, self, "make a new one", what="the device is closed")

    def lose_power(self) -> None:
        """Refuse jobs from now on, and end those that are pending."""
        self.powered = False
        self.epoch += 1

    def regain_power(self) -> None:
        """Accept jobs again."""
        self.powered = True
