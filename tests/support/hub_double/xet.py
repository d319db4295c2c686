"""The Xet side: a content-addressed folder that the real client writes and reads itself (`casUrl: local://DIR`).

hf_xet keeps this local storage for its own tests; should it disappear, the Xet tests skip and the LFS ones remain. A
commit names a file by its sha256 only: the shards in the folder say which Xet hash that is. The client locks the folder
it uploads to, so that every reader gets a copy.
"""

import hashlib
import shutil
import struct
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

ENTRY, HEADER = 48, 48  # bytes
VERIFICATION, METADATA = 1 << 31, 1 << 30  # flags of a file: what follows its entries
BOOKEND = b'\xff' * 32
PROBE = bytes(range(256)) * 64


def _hex(raw: bytes) -> str:
    """32 bytes as Xet prints them: four little-endian 64-bit numbers."""
    return ''.join(f'{number:016x}' for number in struct.unpack('<4Q', raw))


def _shard_files(shard: bytes) -> Iterator[tuple[str, str]]:
    """sha256 and Xet hash of every file that a metadata shard describes."""
    at = HEADER
    while shard[at:at + 32] != BOOKEND:
        xet_hash, flags, count = _hex(shard[at:at + 32]), *struct.unpack_from('<II', shard, at + 32)
        at += ENTRY * (1 + count + (count if flags & VERIFICATION else 0))
        if flags & METADATA:
            yield _hex(shard[at:at + 32]), xet_hash
            at += ENTRY


class XetStorage:
    """One folder of uploads, and a copy of it for every reader."""

    def __init__(self) -> None:
        self.folder = Path(tempfile.mkdtemp(prefix='hub-double-xet-'))
        self.uploads = self.folder / 'uploads'
        self.uploads.mkdir()

    def close(self) -> None:
        shutil.rmtree(self.folder, ignore_errors=True)

    def token(self, kind: str) -> dict[str, str]:
        """The headers of a token for 'write' or 'read'."""
        return {'X-Xet-Cas-Url': f'local://{self.uploads if kind == "write" else self._copy()}',
                'X-Xet-Access-Token': f'xet-{kind}', 'X-Xet-Token-Expiration': str(int(time.time()) + 3600)}

    def find(self, sha256: str) -> str | None:
        """The Xet hash of an uploaded file."""
        for path in self.uploads.rglob('xorbs/shards/*.mdb'):
            found = dict(_shard_files(path.read_bytes())).get(sha256)
            if found:
                return found
        return None

    def read(self, sha256: str, xet_hash: str, size: int) -> bytes:
        """The bytes of an uploaded file, put together by the client's own library. Raises ValueError if they differ."""
        import hf_xet  # type: ignore[import-untyped]
        target = self.folder / f'{sha256}.bytes'
        with hf_xet.XetSession().new_file_download_group(
                endpoint=f'local://{self._copy()}', token='xet-read', token_expiry_unix_secs=2 ** 40) as group:
            group.start_download_file(hf_xet.XetFileInfo(xet_hash, size), str(target))
        data = target.read_bytes()
        if hashlib.sha256(data).hexdigest() != sha256:
            raise ValueError(f'the uploaded chunks give other bytes than {sha256}')
        return data

    def _copy(self) -> str:
        copy = tempfile.mkdtemp(dir=self.folder)
        return str(shutil.copytree(self.uploads, copy, dirs_exist_ok=True))


def works() -> bool:
    """Whether this hf_xet stores to and restores from a folder."""
    storage = XetStorage()
    try:
        import hf_xet
        with hf_xet.XetSession().new_upload_commit(endpoint=storage.token('write')['X-Xet-Cas-Url'], token='xet-write',
                                                   token_expiry_unix_secs=2 ** 40) as commit:
            commit.start_upload_bytes(PROBE, sha256=hf_xet.COMPUTE_SHA256)
        sha256 = hashlib.sha256(PROBE).hexdigest()
        found = storage.find(sha256)
        return found is not None and storage.read(sha256, found, len(PROBE)) == PROBE
    except Exception as error:  # whatever another version of it raises
        print(f'no Xet: {error!r}')
        return False
    finally:
        storage.close()
