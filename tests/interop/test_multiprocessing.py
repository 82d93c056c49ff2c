"""Buffers and their tokens through libraries that start processes: docs/sharing.md says what each of them takes."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

_COMMON = """
import sys
{imports}

def made(i):
    buf = dmabuf.allocate(4096, name=f"frame {{i}}")
    with buf.write() as view:
        view[0] = i
    return buf

def stamp(buf):
    with buf, buf.read() as view:
        return view[0]

def by_token(ref):
    return stamp(dmabuf.open(ref))

def next_of(buf):
    return made(stamp(buf) + 10).give()

def token_of_gone():
    with made(9) as buf:
        return buf.ref()

def failed(call, *arguments):
    try:
        call(*arguments)
    except Exception as e:
        while e.__cause__ is not None and not isinstance(e, OSError):
            e = e.__cause__
        print(type(e).__name__, e)
"""

_HOARD = """
import os, resource
# Functions go to the workers by value, with globals of their own, so what they share is in sys.

def hoard():
    sys.kept = []
    dmabuf.allocate(4096).close()
    resource.setrlimit(resource.RLIMIT_NOFILE, (64, 64))
    try:
        while True:
            sys.kept.append(os.open("/dev/null", os.O_RDONLY))
    except OSError:
        return len(sys.kept)

def use_with_room(buf):
    try:
        said = buf.fileno()
    except OSError as e:
        said = e
    while sys.kept:
        os.close(sys.kept.pop())
    return f"{said} then {stamp(buf)}"
"""

GONE = "NotFoundError open: buffer 'frame 9' (inode … the buffer of this token is gone: no process has it open any more (ENOENT)"
REFUSED = "can't be pickled to bytes: … or pickle buf.ref() and open that with dmabuf.open()"


pytestmark = pytest.mark.usefixtures("keepers_are_reaped")


def run(tmp_path: Path, imports: str, body: str, *arguments: str, **environment: str) -> list[str]:
    """Run a program and return its lines."""
    program = tmp_path / "program.py"
    program.write_text(_COMMON.format(imports=imports) + body)
    command = [sys.executable, str(program), *arguments]
    done = subprocess.run(command, capture_output=True, text=True, check=False, cwd=tmp_path, env={**os.environ, **environment})
    assert done.returncode == 0, done.stderr
    return done.stdout.splitlines()


def says(line: str, expected: str) -> bool:
    """Whether a line has the parts of a text with ``…`` in it, in their order."""
    at = 0
    for part in expected.split("…"):
        at = line.find(part.strip(), at)
        if at < 0:
            return False
    return True


def orders(library: str) -> pytest.MarkDecorator:
    """Import dmabuf before and after a library."""
    return pytest.mark.parametrize("imports", [f"import dmabuf, {library}", f"import {library}, dmabuf"], ids=["before", "after"])


# ---- joblib ----

_JOBLIB = """
if __name__ == "__main__":
    bufs = [made(i) for i in range(3)]
    with joblib.parallel_config(backend=sys.argv[1], n_jobs=2):
        run = joblib.Parallel()
        print(*run(joblib.delayed(by_token)(buf.ref()) for buf in bufs))
        print(*map(stamp, run(joblib.delayed(next_of)(buf) for buf in bufs)))
        failed(run, [joblib.delayed(by_token)(token_of_gone())])
"""


@orders("joblib")
@pytest.mark.parametrize("backend", ["loky", "threading", "multiprocessing"])
def test_joblib_passes_buffers_and_tokens(tmp_path: Path, backend: str, imports: str) -> None:
    pytest.importorskip("joblib")
    tokens, bufs, gone = run(tmp_path, imports, _JOBLIB, backend)
    assert (tokens, bufs) == ("0 1 2", "10 11 12")
    assert says(gone, GONE)


_JOBLIB_POOL = """
import multiprocessing
if __name__ == "__main__":
    with joblib.pool.MemmappingPool(1, context=multiprocessing.get_context("spawn")) as pool:
        pool.apply(hoard)
        with made(2) as buf:
            print(pool.apply_async(use_with_room, (buf,)).get())
        print(pool.apply(abs, (-3,)))
"""


def test_pool_of_joblib_without_a_free_descriptor_goes_on(tmp_path: Path) -> None:
    pytest.importorskip("joblib")
    used, after = run(tmp_path, "import dmabuf, joblib.pool", _HOARD + _JOBLIB_POOL)
    assert says(used, "fileno: buffer 'frame 2' … (EMFILE) … then 2")
    assert after == "3"


# ---- loky ----

_LOKY = """
if __name__ == "__main__":
    with loky.ProcessPoolExecutor(1) as executor:
        print(executor.submit(by_token, made(1).ref()).exception() is not None)  # no handle is left
        buf = made(2)
        print(executor.submit(by_token, buf.ref()).result(), stamp(executor.submit(next_of, buf).result()))
        executor.submit(hoard).result()
        print(executor.submit(use_with_room, buf).result())
        buf.close()
        failed(executor.submit(stamp, buf).result)
        print(executor.submit(abs, -3).result())
"""


def test_loky_passes_buffers_also_without_a_free_descriptor(tmp_path: Path) -> None:
    pytest.importorskip("loky")
    gone, passed, used, *closed, after = run(tmp_path, "import dmabuf, loky", _HOARD + _LOKY)
    assert (gone, passed, after) == ("True", "2 12", "3")
    assert says(used, "fileno: buffer 'frame 2' … (EMFILE) … then 2")
    assert says(" ".join(closed), "ClosedError: pickle: … the buffer was closed before it was pickled (EBADF); pass buf.give()")


# ---- cloudpickle ----

_CLOUDPICKLE = """
import pickle
if __name__ == "__main__":
    buf = made(3)
    ref = buf.ref()
    print(pickle.loads(cloudpickle.dumps(lambda: by_token(ref)))())
    failed(cloudpickle.dumps, lambda: buf)
    ref = token_of_gone()
    failed(pickle.loads(cloudpickle.dumps(lambda: by_token(ref))))
"""


@orders("cloudpickle")
def test_cloudpickle_carries_tokens_and_refuses_buffers(tmp_path: Path, imports: str) -> None:
    pytest.importorskip("cloudpickle")
    token, refused, gone = run(tmp_path, imports, _CLOUDPICKLE)
    assert token == "3"
    assert says(refused, REFUSED)
    assert says(gone, GONE)


# ---- dask ----

_DASK = """
from dask.distributed import Client, LocalCluster
kept = []

def produced(i):
    kept.append(made(i))
    return kept[-1].ref()

if __name__ == "__main__":
    with LocalCluster(n_workers=2, threads_per_worker=1, dashboard_address=None) as cluster, Client(cluster) as client:
        bufs = [made(i) for i in range(4)]
        print(*client.gather(client.map(by_token, [buf.ref() for buf in bufs])))
        tokens = client.map(produced, range(4))
        print(*client.gather(client.map(by_token, tokens)), *map(by_token, client.gather(tokens)))
        print(*dask.compute(*[dask.delayed(by_token)(buf.ref()) for buf in bufs], scheduler="processes"))
        print(client.submit(by_token, client.scatter(bufs[2].ref())).result())
        failed(client.submit(by_token, token_of_gone()).result)
        failed(lambda: client.submit(stamp, bufs[0]).result())
"""


def test_dask_carries_tokens_and_refuses_buffers(tmp_path: Path) -> None:
    pytest.importorskip("distributed")
    sent, produced, processes, scattered, gone, refused = run(tmp_path, "import dask, dmabuf", _DASK)
    assert (sent, produced, processes, scattered) == ("0 1 2 3", "0 1 2 3 0 1 2 3", "0 1 2 3", "2")
    assert says(gone, GONE)
    assert says(refused, REFUSED)


# ---- celery ----

_CELERY = """
import os, subprocess
place = sys.argv[1] if __name__ == "__main__" else os.environ["PLACE"]
folders = {name: os.path.join(place, name) for name in ("queue", "results", "control")}
for folder in folders.values():
    os.makedirs(folder, exist_ok=True)
app = celery.Celery("program", broker="filesystem://", backend="file://" + folders["results"])
queue = folders["queue"]
app.conf.update(
    broker_transport_options={"data_folder_in": queue, "data_folder_out": queue, "control_folder": folders["control"]},
    task_serializer="pickle", result_serializer="pickle", accept_content=["pickle", "json"],
)
read = app.task(by_token, name="read")
kept = []

@app.task(name="produce")
def produce(i):
    kept.append(made(i))
    return kept[-1].ref()

if __name__ == "__main__":
    worker = subprocess.Popen(
        [sys.executable, "-m", "celery", "-A", "program", "worker", "-P", sys.argv[2], "-c", "2", "--without-gossip", "--without-mingle"],
        env={**os.environ, "PLACE": place}, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL,
    )
    try:
        bufs = [made(i) for i in range(3)]
        print(*[read.delay(buf.ref()).get(timeout=60) for buf in bufs])
        print(by_token(produce.delay(7).get(timeout=60)))
        failed(lambda: read.delay(token_of_gone()).get(timeout=60))
        failed(lambda: read.delay(bufs[0]))
    finally:
        worker.terminate()
        worker.wait()
"""


@pytest.mark.parametrize("pool", ["solo", "prefork", "threads"])
def test_celery_carries_tokens_and_refuses_buffers(tmp_path: Path, pool: str) -> None:
    pytest.importorskip("celery")
    read, produced, gone, refused = run(tmp_path, "import celery, dmabuf", _CELERY, str(tmp_path / "place"), pool, C_FORCE_ROOT="1")
    assert (read, produced) == ("0 1 2", "7")
    assert says(gone, GONE)
    assert says(refused, REFUSED)


# ---- torch ----

_TORCH = """
import torch.multiprocessing, torch.utils.data

class Made(torch.utils.data.Dataset):
    def __init__(self, how):
        self.how = how
    def __len__(self):
        return 4
    def __getitem__(self, i):
        buf = made(i)
        if self.how == "closed":
            buf.close()
        return buf.give() if self.how == "given" else buf

class Frames(torch.utils.data.Dataset):
    def __init__(self, bufs):
        self.bufs = bufs
    def __len__(self):
        return len(self.bufs)
    def __getitem__(self, i):
        with self.bufs[i].read() as view:
            return view.tensor(torch.uint8, (4,), copy=True)

def produce(queue, end):
    for how in ("given", "open", "closed"):
        for i in range(2):
            buf = made(i)
            queue.put((torch.full((4,), i), buf.give() if how == "given" else buf))
            if how == "closed":
                buf.close()
    end.wait()

def pair(queue):
    tensor, buf = queue.get()
    return f"{int(tensor[0])}{stamp(buf)}"

if __name__ == "__main__":
    method = sys.argv[1]
    context = torch.multiprocessing.get_context(method)
    queue, end = context.Queue(), context.Event()
    process = context.Process(target=produce, args=(queue, end))
    process.start()
    print(*[pair(queue) for _ in range(4)])
    for _ in range(2):
        failed(pair, queue)
    end.set()
    process.join()
    with context.Pool(1) as pool:
        bufs = pool.map(made, range(3))
        print(*pool.map(by_token, [buf.ref() for buf in bufs]), *map(stamp, bufs))
        pool.close()
        pool.join()
    load = lambda data, **more: list(torch.utils.data.DataLoader(data, batch_size=2, num_workers=1, multiprocessing_context=method, **more))
    print(*[stamp(buf) for batch in load(Made("given"), collate_fn=list) for buf in batch])
    print(*[int(frame[0]) for batch in load(Frames([made(i) for i in range(4)])) for frame in batch])
    failed(lambda: load(Made("closed"), collate_fn=list))
"""


@orders("torch")
@pytest.mark.parametrize("method", ["fork", "spawn"])
def test_torch_passes_buffers_in_queues_pools_and_loaders(tmp_path: Path, method: str, imports: str) -> None:
    pytest.importorskip("torch")
    pytest.importorskip("numpy")
    queue, *closed, pool, loaded, frames, told = run(tmp_path, imports, _TORCH, method)
    assert (queue, pool, loaded, frames) == ("00 11 00 11", "0 1 2 0 1 2", "0 1 2 3", "0 1 2 3")
    # What the queue's thread has pickled before close() arrives, and failed() prints nothing then.
    for line in (*closed, told):
        assert says(line, "ClosedError unpickle: … closed it before the thread of its queue had pickled it (EBADF); put buf.give()")
