"""What a stranger gets from a published repository, seen from a fresh process with an empty cache.

    python -m hub.verify NAME REPO REVISION

The weights must have the sha256 of the package's file, the network that timm builds from the Hub must give the same
logits as the one that it builds from the package, bit for bit, and the inspect command must find the same spectrum by
reading ranges, without fetching the file. Exit codes: 0 all of it holds; 1 not, with a line that says what.
"""

import argparse
import contextlib
import io
import json
import subprocess
import sys
import tempfile
from pathlib import Path

import timm
import torch
from huggingface_hub import hf_hub_download

from timm_nonlocal.files import sha256
from timm_nonlocal.inspect import command as inspect

from .client import ERRORS, explain
from .folder import WEIGHTS, child_environment, last_line
from .results import HUB, PublishError
from .results import WEIGHTS as PACKAGE
from .spectra import of_weights

__all__ = ['verify']


def verify(name: str, repo: str, revision: str, public: bool) -> None:
    """Runs this module in a fresh process with an empty cache, and without a login where the repository is public.

    Raises PublishError with what does not hold.
    """
    with tempfile.TemporaryDirectory() as cache:
        env = {f'HF_{kind}_CACHE': str(Path(cache, kind.lower())) for kind in ('HUB', 'XET', 'ASSETS')}
        if public:
            env['HF_HUB_DISABLE_IMPLICIT_TOKEN'] = '1'
        result = subprocess.run(
            [sys.executable, '-m', 'hub.verify', name, repo, revision], cwd=HUB.parent, capture_output=True, text=True,
            env=child_environment(HF_HUB_DISABLE_PROGRESS_BARS='1', **env))
    if result.returncode:
        raise PublishError(last_line(result.stderr))


def same_spectrum(package: Path, repo: str, revision: str) -> None:
    """The inspect command on the Hub's file. It comes first, so that the cache cannot help it."""
    expected = [list(block.eigenvalues) for block in of_weights(package)]
    if not expected:
        return  # no nonlocal block, nothing to inspect
    with contextlib.redirect_stdout(io.StringIO()) as printed, contextlib.redirect_stderr(io.StringIO()) as complaint:
        code = inspect.main([f'hf-hub:{repo}@{revision}', '--json'])
    if code:
        raise PublishError(f'inspect cannot read it: {last_line(complaint.getvalue())}')
    target = json.loads(printed.getvalue())['targets'][0]
    if [block['eigenvalues'] for stage in target['stages'] for block in stage['blocks']] != expected:
        raise PublishError('inspect finds another spectrum there')
    if target['io']['mode'] != 'range':
        raise PublishError(f'inspect read it by {target["io"]["mode"]} in place of ranges')


def same_weights(package: Path, repo: str, revision: str) -> None:
    published = sha256(Path(hf_hub_download(repo, WEIGHTS, revision=revision)))
    if published != sha256(package):
        raise PublishError(f'{WEIGHTS} has sha256 {published}, not that of {package.name}')


@torch.inference_mode()
def same_logits(name: str, repo: str, revision: str) -> None:
    images = torch.randn(4, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    logits = [timm.create_model(source, pretrained=True).eval()(images) for source in
              (name, f'hf-hub:{repo}@{revision}')]
    if not torch.equal(*logits):
        raise PublishError(f'the logits differ by up to {(logits[0] - logits[1]).abs().max().item():.3g}')


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog='python -m hub.verify', description=__doc__.split('\n\n')[0],
                                     allow_abbrev=False)
    for argument in ('name', 'repo', 'revision'):
        parser.add_argument(argument)
    args = parser.parse_args(argv)
    package = PACKAGE / f'{args.name}.safetensors'
    try:
        same_spectrum(package, args.repo, args.revision)
        same_weights(package, args.repo, args.revision)
        same_logits(args.name, args.repo, args.revision)
    except ERRORS as error:
        print(explain(error), file=sys.stderr)
        return 1
    return 0


if __name__ == '__main__':
    sys.exit(main())
