"""What the fork server of multiprocessing imports once for all its children: all of dmabuf, and what most functions of tests need."""

from tests.support import queues as queues
from tests.support.children import prepare

prepare()
