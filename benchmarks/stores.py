"""What fetching from a store costs this process: CPU seconds of listing and of objects, memory of a large one.

moto's S3 server runs in a process of its own on localhost, so its work does not count, and no network does.

    python benchmarks/stores.py [--objects 2000] [--port 5917]
"""

import argparse
import hashlib
import json
import os
import random
import subprocess
import sys
import tempfile
import time
import urllib.request
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from shortcut_cli.data import objects

SMALL_BYTES, LARGE_BYTES = 10_000, 256 << 20
SETTINGS = {"AWS_ACCESS_KEY_ID": "key", "AWS_SECRET_ACCESS_KEY": "secret", "AWS_DEFAULT_REGION": "us-east-1"}


def main() -> None:
    """Print one JSON object."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--objects", type=int, default=2000)
    parser.add_argument("--port", type=int, default=5917)
    given = parser.parse_args()
    url = f"http://127.0.0.1:{given.port}"
    os.environ |= SETTINGS | {"AWS_ENDPOINT_URL": url}
    command = [sys.executable, "-m", "moto.server", "-H", "127.0.0.1", "-p", str(given.port)]
    server = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    try:
        wait_for(url)
        with tempfile.TemporaryDirectory() as folder:
            print(json.dumps(measure(given.objects, Path(folder)), indent=1))
    finally:
        server.terminate()


def wait_for(url: str) -> None:
    """Wait until a server answers, at most a minute."""
    for _ in range(600):
        try:
            urllib.request.urlopen(f"{url}/moto-api/").close()
            return
        except OSError:
            time.sleep(0.1)
    raise SystemExit(f"{url} does not answer")


def measure(count: int, folder: Path) -> dict[str, float]:
    """CPU seconds of this process, and MB of memory."""
    import s3fs

    system = s3fs.S3FileSystem()
    system.mkdir("bench")
    content, large = random.Random(1).randbytes(SMALL_BYTES), random.Random(2).randbytes(1 << 20) * (LARGE_BYTES >> 20)

    def put(number: int) -> None:
        system.pipe_file(f"bench/small/{number:06d}", content + str(number).encode())

    with ThreadPoolExecutor(8) as pool:
        list(pool.map(put, range(count)))
    system.pipe_file("bench/large/one", large)
    wanted = hashlib.sha256(large).hexdigest()
    del large
    began = time.process_time()
    listed = list(objects.Store("s3://bench/small").listed())
    listing_s, began = time.process_time() - began, time.process_time()
    with ThreadPoolExecutor(objects.THREADS) as pool:
        list(pool.map(lambda one: one[1].fetch(folder / one[0]), listed))
    fetching_s = time.process_time() - began
    Path("/proc/self/clear_refs").write_text("5")  # the peak begins here
    before, began = memory_mb("VmRSS"), time.process_time()
    ((_, one),) = objects.Store("s3://bench/large/one").listed()
    assert one.fetch(folder / "large") == wanted
    return {
        "objects": len(listed),
        "listing_cpu_ms_per_1000": round(1e6 * listing_s / len(listed), 1),
        "fetching_cpu_ms_per_object": round(1e3 * fetching_s / len(listed), 2),
        "large_mb": LARGE_BYTES / 1e6,
        "large_cpu_s": round(time.process_time() - began, 2),
        "large_memory_mb": round(memory_mb("VmHWM") - before, 1),
    }


def memory_mb(field: str) -> float:
    """A field of /proc/self/status in MB."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith(field)) * 1024 / 1e6


if __name__ == "__main__":
    main()
