"""Publishes weight files with honest cards on the Hugging Face Hub, each in a repository of its own, and verifies them.

    python -m hub.publish [NAME…] --namespace NS [--dry-run] [--private] [--revision BRANCH]

The token is the client's own: HF_TOKEN, or what `hf auth login` saved. What is already there is not uploaded again,
so that the same command continues after a failure. Exit codes: 0 all is published and verified; 1 something is missing,
and named; 2 the arguments, the weights or the results are off.
"""

import argparse
import difflib
import re
import sys
import tempfile
import traceback
from pathlib import Path

from huggingface_hub import CommitOperationAdd, HfApi
from huggingface_hub.errors import OfflineModeIsEnabled
from huggingface_hub.hf_api import RepoFile, RepoFolder
from huggingface_hub.utils import disable_progress_bars
from huggingface_hub.utils.sha import git_hash

from timm_nonlocal.files import sha256

from .client import ERRORS, explain, status
from .folder import WEIGHTS, build
from .results import PublishError, Record, Shipped, load, shipped
from .verify import verify

STEPS = ('build', 'create', 'upload', 'tag', 'verify')


class Unfinished(Exception):
    """A publication that stopped at a step. `hopeless` where every other one would stop alike."""

    def __init__(self, step: str, reason: str, hopeless: bool = False):
        super().__init__(reason)
        self.step, self.hopeless = step, hopeless


def upload(api: HfApi, repo: str, head: str, folder: Path, branch: str) -> tuple[str, str]:
    """Commits the files of a folder that the head of a branch does not hold byte for byte.

    Returns:
        The commit that holds them all, and what was done in words.
    """
    paths = sorted(folder.iterdir())
    there = {info.path: info for info in api.get_paths_info(repo, [path.name for path in paths], revision=head)}
    changed = [path for path in paths if not _holds(there.get(path.name), path)]
    if not changed:
        return head, 'nothing to upload'
    names, size = ', '.join(path.name for path in changed), sum(path.stat().st_size for path in changed)
    commit = api.create_commit(repo, [CommitOperationAdd(path.name, path) for path in changed], revision=branch,
                               parent_commit=head, commit_message=f'{repo.split("/")[1]}: {names}')
    return commit.oid, f'{len(changed)} files, {size:,} bytes uploaded'


def _holds(info: RepoFile | RepoFolder | None, path: Path) -> bool:
    if not isinstance(info, RepoFile):
        return False
    return info.lfs.sha256 == sha256(path) if info.lfs else info.blob_id == git_hash(path.read_bytes())


def tag(api: HfApi, repo: str, commit: str, file: Shipped) -> str:
    """Pins these weights under a tag that names them; a tag that is there already is never moved."""
    name = f'weights-{file.sha256[:12]}'
    if name in [ref.name for ref in api.list_repo_refs(repo).tags]:
        (info,) = api.get_paths_info(repo, [WEIGHTS], revision=name) or (None,)
        if not _holds(info, file.path):
            raise PublishError(f'the tag {name} exists and holds other weights: delete it there')
    else:
        api.create_tag(repo, tag=name, revision=commit, tag_message=f'{file.name}, sha256 {file.sha256}')
    return name


def publish(api: HfApi, file: Shipped, records: list[Record], args: argparse.Namespace) -> str:
    """All steps for one weight file; says in a line what was done. Raises Unfinished."""
    repo, step = f'{args.namespace}/{file.name}', STEPS[0]
    try:
        with tempfile.TemporaryDirectory() as folder:
            build(file, records, args.namespace, Path(folder))
            step = 'create'
            api.create_repo(repo, private=args.private or None, exist_ok=True)
            if args.private and not api.repo_info(repo).private:
                raise PublishError('the repository exists and is public: make it private there, or leave out --private')
            if args.revision != 'main':
                api.create_branch(repo, branch=args.revision, exist_ok=True)
            step = 'upload'
            head = api.repo_info(repo, revision=args.revision)
            assert head.sha is not None  # of a repository that exists
            commit, done = upload(api, repo, head.sha, Path(folder), args.revision)
        step = 'tag'
        name = tag(api, repo, commit, file)
        step = 'verify'
        verify(file.name, repo, commit, public=not head.private)
    except ERRORS as error:
        if args.traceback:
            traceback.print_exc()
        hopeless = status(error) in (401, 403) or isinstance(error, OfflineModeIsEnabled)
        raise Unfinished(step, explain(error), hopeless) from error
    return f'{repo}@{commit[:12]}: {done}, tag {name}, verified'


def publish_all(api: HfApi, files: list[Shipped], records: list[Record], args: argparse.Namespace) -> dict[str, str]:
    """Publishes one after the other and says so. Gives the names that are not finished with the step they are at."""
    missing = {file.name: STEPS[0] for file in files}
    for file in files:
        try:
            print(publish(api, file, records, args), flush=True)
            del missing[file.name]
        except Unfinished as stop:
            missing[file.name] = stop.step
            print(f'error: {args.namespace}/{file.name}: {stop.step}: {stop}', file=sys.stderr)
            if stop.hopeless:
                break
        except KeyboardInterrupt:
            print('stopped', file=sys.stderr)
            break
    return missing


def dry_run(files: list[Shipped], records: list[Record], namespace: str) -> None:
    """Builds every folder and lists its files with sizes and sha256. Raises PublishError."""
    for file in files:
        print(f'{namespace}/{file.name}')
        with tempfile.TemporaryDirectory() as folder:
            build(file, records, namespace, Path(folder))
            for path in sorted(Path(folder).iterdir()):
                print(f'  {path.name:<18} {path.stat().st_size:>10,}  {sha256(path)}')


def select(names: list[str], files: list[Shipped]) -> list[Shipped]:
    """The weight files of these names, all without any. Raises PublishError for a name without weights."""
    if not files:
        raise PublishError('timm_nonlocal/weights holds no weights: there is nothing to publish')
    known = {file.name: file for file in files}
    for name in names:
        if name not in known:
            near = difflib.get_close_matches(name, known, n=3, cutoff=0.3) or list(known)[:3]
            raise PublishError(f'{name} has no weights; these have: {", ".join(near)}')
    return [known[name] for name in names] if names else files


def parse(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog='python -m hub.publish', description=__doc__.split('\n\n')[0],
                                     allow_abbrev=False)
    parser.add_argument('names', nargs='*', metavar='NAME', help='architecture.tag of a weight file (default: all)')
    parser.add_argument('--namespace', required=True, metavar='NS', help='the user or organisation to publish under')
    parser.add_argument('--dry-run', action='store_true', help='build the folders and list them; no network')
    parser.add_argument('--private', action='store_true',
                        help='create new repositories as private ones, and upload to none that is public')
    parser.add_argument('--revision', default='main', metavar='BRANCH', help='the branch to upload to (default: main)')
    parser.add_argument('--traceback', action='store_true', help='show where an error comes from')
    args = parser.parse_args(argv)
    if not re.fullmatch(r'[\w.-]+', args.namespace, re.ASCII):
        parser.error(f'--namespace {args.namespace}: write the name of a user or an organisation alone')
    return args


def main(argv: list[str] | None = None) -> int:
    args = parse(argv)
    try:
        records = load()
        files = select(args.names, shipped(records))
        if args.dry_run:
            dry_run(files, records, args.namespace)
            return 0
    except PublishError as error:
        print(f'error: {error}', file=sys.stderr)
        return 2
    disable_progress_bars()
    missing = publish_all(HfApi(library_name='timm_nonlocal'), files, records, args)
    for name, step in missing.items():
        print(f'missing: {args.namespace}/{name}: {", ".join(STEPS[STEPS.index(step):])}', file=sys.stderr)
    if missing:
        print('the same command continues', file=sys.stderr)
    return 1 if missing else 0


if __name__ == '__main__':
    sys.exit(main())
