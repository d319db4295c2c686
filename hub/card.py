"""The card of one weight file: front matter with a model-index, and the text under it."""

import re
from itertools import groupby

from huggingface_hub import EvalResult, ModelCardData

from timm_nonlocal import paper
from timm_nonlocal.analysis.spectra import Spectrum
from timm_nonlocal.datasets import DATASETS
from timm_nonlocal.recipes import Recipe, recipe_id

from .index import create, parameters
from .results import Record, Shipped, counted, deviations, diverged, median_records, precision, summary
from .spectra import of_weights

__all__ = ['card', 'published']

NAMESPACE = 'NAMESPACE'  # stands in a committed card for where it is published
PICTURE = '<!-- ![{}]({}) -->'  # it is made when the card is published, and stands beside it there
EQUATIONS = {'original': 'eq. (1)', 'proposed': 'eq. (8)'}


def front_matter(file: Shipped) -> str:
    """YAML that the Hub reads. The accuracy is that of this very file, and left out where only a part was tested."""
    data = DATASETS[file.dataset]
    results = [] if file.record.get('limit') else [EvalResult(
        task_type='image-classification', dataset_type=data.hub_id, dataset_name=data.title, dataset_split='test',
        metric_type='accuracy', metric_name='Accuracy', metric_value=round(100 - file.record['final_error'], 4))]
    return ModelCardData(
        library_name='timm', pipeline_tag='image-classification', license='apache-2.0', datasets=[data.hub_id],
        metrics=['accuracy'], tags=['image-classification', 'timm', 'timm_nonlocal', 'nonlocal'],
        model_name=file.name if results else None, eval_results=results or None).to_yaml()


def describe(architecture: str) -> str:
    """The network in words, from its name."""
    depth, _, rest = architecture.removeprefix('preresnet').partition('_nl_')
    backbone = f'PreResNet-{depth}'
    if not rest:
        return f'{backbone}, the plain backbone'
    kind, _, count = rest.partition('_k')
    if count == '1x3':
        what, where = ('blocks' if kind == 'original' else 'stages of one sub-block'), 'one in each of its three stages'
        return f'{backbone} with {kind} nonlocal {what} ({EQUATIONS[kind]} of the paper), {where}'
    plural = 's' * (count != '1')
    what = (f'{count} original nonlocal block{plural}' if kind == 'original'
            else f'a proposed nonlocal stage of {count} sub-block{plural}')
    return f'{backbone} with {what} ({EQUATIONS[kind]} of the paper) after the second unit of its first stage'


def results_text(file: Shipped, records: list[Record]) -> str:
    """This file's error beside our runs' and the paper's, then every run."""
    theirs, name = paper.error(file.architecture, file.dataset), file.recipe
    found = counted(records, file.architecture, file.dataset, name)
    ours = summary(found.finished)
    median = ('' if file.record not in found.finished else ', the only run' if len(found.all) == 1 else
              ', a median run' if file.record in median_records(found.finished) else ', not a median run')
    interval = f'{ours.median:.2f} ({ours.lowest:.2f}–{ours.highest:.2f}, n = {found.n})' if ours else 'none'
    lines = ['| | test error after the last epoch, % |', '| --- | --- |',
             f'| this file (seed {file.record["seed"]}{median}) | {file.record["final_error"]:.2f} |',
             f'| our runs of the recipe `{name}`, median (range, n) | {interval} |',
             f'| the paper, median of {paper.RUNS} | {"not reported" if theirs is None else f"{theirs:.2f}"} |']
    if found.all:
        lines += ['', '| seed | last epoch, % | best epoch, % | sha256 of the weights |', '| --- | --- | --- | --- |',
                  *map(_run_text, found.all), '',
                  'The best epoch is chosen by the test images, so it is no estimate of anything; it is here to show '
                  'how much such a choice would flatter.']
    return '\n'.join(lines)


def _run_text(record: Record) -> str:
    last = f'diverged in epoch {record["diverged_epoch"]}' if diverged(record) else f'{record["final_error"]:.2f}'
    return (f'| {record["seed"]} | {last} | {record["best_error"]:.2f} ({record["best_epoch"]}) | '
            f'`{record["sha256"][:12]}` |')


def rates(recipe: Recipe) -> str:
    """The learning rates in words."""
    rise = f'growing to {recipe.lr} in the first {100 * recipe.warmup:g} % of the steps' if recipe.warmup else recipe.lr
    falls = ('then falling linearly to 0' if recipe.anneal == 'linear' else
             f'times {recipe.gamma} after epochs {", ".join(map(str, recipe.milestones))}')
    return f'learning rate {rise}, {falls}' if recipe.warmup else f'learning rate {rise} {falls}'


def training_text(record: Record) -> str:
    """How this file was trained, field by field."""
    recipe, versions, start = Recipe.from_dict(record['recipe']), record.get('versions', {}), record.get('start')
    at_once, seconds = record.get('at_once', 1), record.get('seconds')
    rows = [
        ('data', f'{DATASETS[record["dataset"]].title}, divided by 255, the training images’ mean {recipe.mean} '
                 f'subtracted; random crops of the image padded by 4, random flips'),
        ('starts from', start and f'`{start["name"]}` (sha256 `{start["sha256"][:12]}`)' + (
            ', the nonlocal modules as the identity' * ('_nl_' in record['architecture']))),
        ('recipe', f'`{recipe_id(recipe)}`: {recipe.epochs} epochs, batch {recipe.batch_size}, SGD with '
                   f'{"Nesterov " * recipe.nesterov}momentum {recipe.momentum}, weight decay {recipe.weight_decay} on '
                   f'every parameter, {rates(recipe)}'),
        ('differs from the paper in', '; '.join(deviations(record)) or 'nothing that the paper states'),
        ('precision', precision(record)),
        ('device', record.get('device')),
        ('time', (f'{seconds / 3600:.2f} hours' if seconds > 360 else f'{seconds / 60:.1f} minutes')
         + f', of {at_once} runs side by side' * (at_once > 1) if seconds else None),
        ('versions', ', '.join(f'{name} {version}' for name, version in versions.items() if version)),
        ('commit', ', '.join(f'`{commit}`' for commit in record.get('commits') or [record.get('commit')] if commit)),
        ('sha256', f'`{record["sha256"]}`'),
    ]
    return '\n'.join(['| | |', '| --- | --- |', *(f'| {name} | {value} |' for name, value in rows if value)])


def spectrum_text(blocks: list[Spectrum]) -> str:
    """The signs of the top eigenvalues of every block, with what chance gives."""
    if not blocks:
        return 'There is no nonlocal block, so there is no spectrum.'
    parts = []
    for stage, same in groupby(blocks, key=lambda block: block.stage):
        group = list(same)
        first = group[0]
        parts += [f'`{stage}`, C = {first.C}, C′ = {first.C_inner}; random weights have {first.neg_top_null:.1f} ± '
                  f'{first.neg_top_null_sd:.1f} of either sign:', '\n'.join([
                      f'| block | negative in the top {first.top_k} | positive | trace |',
                      '| --- | --- | --- | --- |',
                      *(f'| {block.index + 1} | {block.neg_top} | {block.pos_top} | {block.trace:.3f} |'
                        for block in group)])]
    return '\n\n'.join(['Eigenvalues of the symmetric part of W = W_Z W_g (eq. (7)), the largest by magnitude.', *parts,
                        PICTURE.format('The top eigenvalues of every block', 'spectrum.png')])


def published(text: str, namespace: str) -> str:
    """A committed card as it is published: under a namespace, with its pictures."""
    text = text.replace(f'{NAMESPACE}/', f'{namespace}/')
    return re.sub(PICTURE.replace('(', r'\(').replace(')', r'\)').replace('[', r'\[').replace('{}', '(.*?)'),
                  r'![\1](\2)', text)


def card(file: Shipped, records: list[Record]) -> tuple[str, str]:
    """Front matter and text of a weight file's card."""
    unlike = deviations(file.record)
    what = 'Fine-tuned, which is not' if file.recipe == 'ft' else 'Not'
    warning = [f'**{what} the paper’s recipe: {"; ".join(unlike)}.** The error below says nothing of the paper’s.'
               ] if unlike else []
    preprocessing = ('The network was trained on images minus the mean image; `transform` subtracts the mean colour, '
                     'the nearest that timm’s data configuration can say. In a clone of the project '
                     f'`python -m train.evaluate {file.name}` gives the test error under either.'
                     if file.record['recipe'].get('mean', 'image') == 'image' else
                     '`transform` is the preprocessing that the network was trained and tested with.')
    name, repo = file.name, f'{NAMESPACE}/{file.name}'
    spectrum = of_weights(file.path)
    return front_matter(file), '\n\n'.join([
        f'# {name}', *warning,
        f'{describe(file.architecture)}, trained on {DATASETS[file.dataset].title}: {parameters(create(name)):,} '
        f'parameters, images of 32×32. It belongs to [{paper.TITLE}](https://arxiv.org/abs/{paper.ARXIV}) (Tao, Sun, '
        f'Du, Liu, NeurIPS 2018); the weights are ours, not its authors’, who published none that we know of.',
        '## Use',
        f'```python\nimport timm_nonlocal  # registers the architecture: without it timm knows no such model\n\n'
        f'import timm\n\n'
        f"model = timm.create_model('hf-hub:{repo}', pretrained=True).eval()\n"
        f'transform = timm.data.create_transform(**timm.data.resolve_model_data_config(model))\n```',
        'The snippet that the Hub itself offers lacks that first import. The inference widget cannot serve an '
        f'architecture from outside timm. {preprocessing}',
        *([f'What its blocks have learned, read over range requests:\n\n'
           f'```sh\npython -m timm_nonlocal.inspect hf-hub:{repo}\n```'] if spectrum else []),
        '## Results', results_text(file, records),
        PICTURE.format('Training loss and errors after every epoch', 'curve.png'),
        '## Training', training_text(file.record),
        '## Spectrum', spectrum_text(spectrum),
        '## Limits',
        'CIFAR images only: 32×32 pixels, the classes of the data set, no claim beyond its test split. Errors are '
        'those after the last epoch, so that the test images chose no epoch.',
        '## Citation', f'```bibtex\n{paper.CITATION}\n```'])
