"""The page: its numbers are those of the JSON, its text is text, and a browser fetches nothing to show it."""

import json
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
from PIL import Image
from safetensors.torch import save_file
from timm.models import save_for_hf

from tests.support.one_line import Command, fails
from timm_nonlocal import NonlocalBlock
from timm_nonlocal.analysis.recorder import rows
from timm_nonlocal.inspect.report import COLUMNS, number

pytest.importorskip('matplotlib')
CHROMIUM = Path('/usr/bin/chromium')


class Page(HTMLParser):
    """What a test asks of a page: its elements, the text of its cells, and everything that could be fetched."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.tags: list[str] = []
        self.cells: dict[tuple[str | None, str | None], list[str]] = {}
        self.attributes: list[tuple[str, dict[str, Any]]] = []
        self.text = ''
        self.cell: tuple[str | None, str | None] | None = None
        self.feed(text)

    def handle_starttag(self, tag: str, attributes: list[tuple[str, str | None]]) -> None:
        found = dict(attributes)
        self.tags.append(tag)
        self.attributes.append((tag, found))
        if 'data-field' in found:
            self.cell = (found['data-field'], found.get('data-block'))
            self.cells.setdefault(self.cell, [])

    def handle_endtag(self, tag: str) -> None:
        self.cell = None if tag == 'td' else self.cell

    def handle_data(self, data: str) -> None:
        self.text += data
        if self.cell:
            self.cells[self.cell].append(data.strip())

    def number(self, field: str, block: str | None = None) -> float:
        (text,) = self.cells[field, block]
        return float(text.replace('−', '-'))

    @property
    def fetched(self) -> list[str]:
        """Addresses that are neither inside the page nor data."""
        return [value for tag, found in self.attributes for name, value in found.items()
                if name in ('src', 'href', 'xlink:href', 'srcset', 'data', 'action', 'poster')
                and not value.startswith(('#', 'data:'))]


@pytest.fixture
def runs(tmp_path: Path) -> list[Path]:
    """Two networks in folders, with modules where A is small: four sub-blocks in two stages, and two blocks."""
    for name in ('preresnet20_nl_proposed_k2', 'preresnet20_nl_original_k1'):
        save_for_hf(timm.create_model(name, nl_stages=(2, 3)), str(tmp_path / name), safe_serialization=True,
                    model_args={'nl_stages': (2, 3)})
    return sorted(tmp_path.iterdir(), reverse=True)


def test_numbers_are_those_of_the_json(inspect: Command, runs: list[Path], small_cifar_here: Path,
                                       tmp_path: Path) -> None:
    path = tmp_path / 'page.html'
    code, out, err = inspect(*runs, '--data-dir', small_cifar_here, '--num-images', 1, '--check', 'neg_top<3', '--json',
                             '--html', path)
    assert code == 1 and 'check failed' in err
    text, document = path.read_text(), json.loads(out)
    page = Page(text)
    blocks = 0
    for mark, target in zip('AB', document['targets'], strict=True):
        for stage in target['stages']:
            for block in stage['blocks']:
                where, blocks = f'{mark} {stage["name"]} {block["index"]}', blocks + 1
                stability = block['stability']
                expected = {'neg_top': str(block['neg_top']), 'kappa': f'{stability["kappa"]:.4f}',
                            'outside': f'{stability["outside"]}/{block["C_inner"]}',
                            **{field: number(block[field], form) for _, _, field, form in COLUMNS}}
                for field, shown in expected.items():
                    assert page.cells[field, where] == [shown.replace('-', '−')], field
        assert target['input'] in page.text and target['file'] in page.text
    assert blocks == 6 and page.tags.count('svg') == 6 + 6 + 4  # spectra, planes, energies of every stage
    images = [found for tag, found in page.attributes if tag == 'img']
    assert len(images) == 4 * 1 * 6 and all(found['alt'] for found in images)
    for name in ('learned', 'uniform', 'identity'):
        assert page.cells[f'accuracy {name}', None] == [
            f'{target["images"]["accuracy"][name]:.2f}' for target in document['targets']]
    assert 'fails neg_top<3' in page.text
    for version in document['tool'].values():
        assert version in page.text
    assert f'--html {path}' in page.text and page.fetched == [] and 'script' not in page.tags
    ids = [found['id'] for _, found in page.attributes if 'id' in found]
    assert len(ids) == len(set(ids))


def test_without_stability_and_images_there_is_less(inspect: Command, runs: list[Path], tmp_path: Path) -> None:
    assert inspect(runs[1], '--html', tmp_path / 'page.html', '-q')[0] == 0
    page = Page((tmp_path / 'page.html').read_text())
    assert page.tags.count('svg') == 2 and 'img' not in page.tags and 'CFL' not in page.text
    assert ('kappa', 'A layer2.nl 0') not in page.cells
    before = (tmp_path / 'page.html').read_bytes()
    inspect(runs[1], '--html', tmp_path / 'page.html', '-q')
    assert (tmp_path / 'page.html').read_bytes() == before and not list(tmp_path.glob('.*'))


def test_names_are_text(inspect: Command, tmp_path: Path) -> None:
    name = '<script>alert(1)</script>\033[31m\u202e"&'
    save_file({f'{name}.{part}.weight': torch.randn(*shape) for part, shape in (
        ('theta', (3, 6)), ('g', (3, 6)), ('z', (6, 3)))}, tmp_path / 'x.safetensors')
    assert inspect(tmp_path / 'x.safetensors', tmp_path / '<b>gone', '--stability', '--html', tmp_path / 'page.html',
                   '-q')[0] == 3
    text = (tmp_path / 'page.html').read_text()
    page = Page(text)
    assert not {'script', 'b>gone'} & {*page.tags} and not {'\033', '\u202e'} & {*text}
    assert r'<script>alert(1)</script>\x1b[31m\u202e"&' in page.text and '<b>gone' in page.text
    assert "default-src 'none'" in text


def test_blocks_that_are_not_finite_and_many(inspect: Command, tmp_path: Path) -> None:
    model: Any = timm.create_model('preresnet20_nl_proposed_k2')
    model.layer1.nl.sub_blocks[0].g.weight.data.fill_(float('nan'))
    save_file(model.state_dict(), tmp_path / 'x.safetensors')
    assert inspect(*[tmp_path / 'x.safetensors'] * 8, '--stability', '--html', tmp_path / 'page.html', '-q')[0] == 1
    page = Page((tmp_path / 'page.html').read_text())
    assert page.cells['trace', 'H layer1.nl 0'] == ['–'] and page.number('trace', 'H layer1.nl 1') != 0
    assert page.tags.count('table') == 2 and 'not finite' in page.text  # 12 blocks side by side at most


def test_a_page_that_cannot_be_made(inspect: Command, runs: list[Path], tmp_path: Path,
                                    monkeypatch: pytest.MonkeyPatch) -> None:
    code, out, err = inspect(runs[0], '--html', tmp_path / 'page.txt')
    assert (code, out) == (2, '') and 'name a file that ends in .html' in err
    code, _, err = inspect(runs[0], '--html', tmp_path / 'missing' / 'page.html', '-q')
    assert code == 2 and len(err.splitlines()) == 1
    (tmp_path / 'folder.html').mkdir()
    code, _, err = inspect(runs[0], '--html', tmp_path / 'folder.html', '-q')
    assert code == 2 and len(err.splitlines()) == 1
    fails(inspect, 3, 'no such file', tmp_path / 'gone.pth', '--html', tmp_path / 'page.html')
    assert not (tmp_path / 'page.html').exists()
    monkeypatch.setitem(sys.modules, 'matplotlib.figure', None)
    code, _, err = inspect(runs[0], '--html', tmp_path / 'page.html', '-q')
    assert code == 2 and "--html needs matplotlib: pip install 'timm_nonlocal[plot]'" in err


def test_rows_are_those_of_a() -> None:
    blocks: Any = torch.nn.Sequential(NonlocalBlock(4), NonlocalBlock(4)).eval()
    x = torch.randn(2, 4, 5, 3)
    found = rows(blocks, x, [(0, 0), (0.5, 0.5), (0.99, 0.99)])
    for name, image in (('0', x), ('1', blocks[0](x))):
        a = blocks[int(name)].relate(image.flatten(2).transpose(1, 2))
        torch.testing.assert_close(found[name][0].flatten(2).float(), a[:, [0, 7, 14]])


@contextmanager
def opened(path: Path, width: int, scheme: str) -> Iterator[tuple[Any, list[str], list[str]]]:
    """The page in a browser, the addresses it asks for (answered is itself alone), and what the console says."""
    playwright = pytest.importorskip('playwright.sync_api', reason='no playwright: pip install playwright')
    if not CHROMIUM.is_file():
        pytest.skip(f'no {CHROMIUM}')
    requests, complaints = [], []

    def answer(route: Any) -> None:
        requests.append(route.request.url)
        route.continue_() if route.request.url == path.as_uri() else route.abort()

    with playwright.sync_playwright() as chrome:
        browser = chrome.chromium.launch(executable_path=str(CHROMIUM), args=['--no-sandbox'])
        tab = browser.new_context(viewport={'width': width, 'height': 900}, color_scheme=scheme).new_page()
        tab.route(lambda url: not url.startswith('data:'), answer)
        tab.on('console', lambda message: complaints.append(message.text))
        tab.on('pageerror', lambda error: complaints.append(str(error)))
        tab.goto(path.as_uri(), wait_until='networkidle')
        yield tab, requests, complaints
        browser.close()


@pytest.mark.slow
@pytest.mark.parametrize(('width', 'scheme'), [(1280, 'light'), (390, 'dark')])
@pytest.mark.parametrize('watched', ['--data-dir', '--images', '--stability'])
def test_a_browser_shows_it_and_fetches_nothing(inspect: Command, runs: list[Path], small_cifar_here: Path,
                                                tmp_path: Path, watched: str, width: int, scheme: str) -> None:
    (tmp_path / 'pictures').mkdir()
    for name in 'ab':
        Image.effect_noise((300, 200), 90).convert('RGB').save(tmp_path / 'pictures' / f'{name}.png')
    where = {'--data-dir': [small_cifar_here], '--images': [tmp_path / 'pictures'], '--stability': []}[watched]
    code, out, _ = inspect(*runs, watched, *where, '--num-images', 2, '--html', tmp_path / 'page.html', '--json')
    blocks = [block for target in json.loads(out)['targets'] for stage in target['stages']
              for block in stage['blocks']]
    with opened(tmp_path / 'page.html', width, scheme) as (tab, requests, complaints):
        assert (code, requests, complaints) == (0, [(tmp_path / 'page.html').as_uri()], [])
        assert tab.evaluate('document.documentElement.scrollWidth') <= width
        images = tab.evaluate('[...document.images].map(image => [image.complete, image.naturalWidth])')
        assert len(images) == (0 if watched == '--stability' else 4 * 2 * 6)
        assert all(complete and natural > 0 for complete, natural in images)
        shown = tab.locator('td[data-field=neg_top]').all_inner_texts()
        assert [int(text) for text in shown] == [block['neg_top'] for block in blocks]
        drawn = tab.evaluate('[...document.querySelectorAll("svg")].map(svg => [svg.clientWidth, '
                             'svg.getBBox().height])')
        assert len(drawn) == (12 if watched == '--stability' else 16) and all(min(size) > 50 for size in drawn)
        ink, ground = tab.evaluate('["color", "backgroundColor"].map(name => getComputedStyle(document.body)[name]'
                                   '.match(/[0-9]+/g).map(Number).reduce((a, b) => a + b))')
        assert (ink < ground) == (scheme == 'light')
