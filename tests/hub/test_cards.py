"""Cards: what counts in the tables, what is generated and what is kept, and that drift is noticed."""

import json
import re
import shutil
from pathlib import Path
from typing import Any

import pytest
from huggingface_hub import ModelCard
from timm import is_model

import timm_nonlocal  # noqa: F401
from hub import card, cards, drawing, folder, generated, results
from hub.results import PublishError, Record
from tests.support.process import ROOT
from tests.support.weight_files import Project, made_up
from timm_nonlocal import paper
from timm_nonlocal.files import sha256 as sha256_of_file
from timm_nonlocal.recipes import FINE_TUNING, PAPER, SHORT


def test_the_committed_cards_are_what_the_results_make_them() -> None:
    assert cards.main(['--check']) == 0


def test_the_papers_tables() -> None:
    """Against the numbers as the issue lists them, and every row is a network that exists."""
    first, second = ([row.error for row in table.rows] for table in paper.TABLES)
    assert first == [8.19, None, 7.83, 8.28, 15.02, 7.74, 7.62, 7.37, 7.29, 7.55, 8.07, 7.33]
    assert second == [26.57, 26.13, 26.26, 34.89, 26.04, 25.57, 25.43, 25.29, 25.49]
    names = [row.architecture for table in paper.TABLES for row in table.rows]
    assert len(set(names)) == 21 and all(map(is_model, names))
    assert paper.error('preresnet56_nl_original_k4', 'cifar100') == 34.89
    assert paper.error('preresnet56', 'cifar10') is None


def test_only_the_papers_recipe_counts() -> None:
    assert results.deviations(made_up()) == []
    assert results.deviations(made_up('preresnet20_nl_original_k4', recipe=PAPER.to_dict())) == [
        'lr 0.1 in place of 0.01']
    others = [made_up(limit=100), made_up(model_kwargs=['nl_k=3']),
              made_up(recipe={**PAPER.to_dict(), 'epochs': 10})]
    assert [results.deviations(other) for other in others] == [
        ['the first 100 images only'], ['model arguments nl_k=3'], ['epochs 10 in place of 164']]
    all_runs = [*others, made_up(seed=4), made_up(seed=1), made_up('preresnet56')]
    assert results.counted(all_runs, 'preresnet20', 'cifar10') == (
        [made_up(seed=1), made_up(seed=4)], [])
    twice = [made_up(seed=1), made_up(seed=1, error=9.0)]
    with pytest.raises(PublishError, match=r'two runs of preresnet20\.cifar10 with seed 1'):
        results.counted(twice, 'preresnet20', 'cifar10')
    twice[1]['mixed_precision'] = 'bf16'  # another run
    assert results.counted(twice, 'preresnet20', 'cifar10').finished == twice


def test_tags_are_given_by_recipe() -> None:
    tuned = made_up(recipe=FINE_TUNING.to_dict(), start={'name': 'preresnet20.cifar10', 'sha256': '0'})
    for run, tag in ((made_up(), 'cifar10'), (made_up('preresnet56', 'cifar100'), 'cifar100'), (tuned, 'ft_cifar10'),
                     ({**tuned, 'start': None}, None), (made_up(limit=10), None), ({**tuned, 'limit': 10}, None),
                     (made_up(recipe=SHORT.to_dict()), None), (made_up(model_kwargs=['depth=29']), None),
                     (made_up(processes=2), None), (made_up(recipe={**PAPER.to_dict(), 'lr': 0.01}), None),
                     (made_up('preresnet20_nl_original_k4'), 'cifar10')):
        assert results.tag(run) == tag, run
    assert results.counted([made_up(), tuned], 'preresnet20', 'cifar10', 'ft').all == [tuned]


def test_the_median_ships_and_what_diverged_does_not() -> None:
    runs = [made_up(seed=seed, error=error) for seed, error in enumerate((8.3, 8.1, 8.2, 8.0))]
    lost = made_up(seed=5, error=90.0, diverged_epoch=3)
    assert results.to_ship([*runs, lost]) == {'preresnet20.cifar10': runs[1]}, 'the lower of two in the middle'
    assert results.to_ship([lost]) == {}
    text = cards.table_text(paper.TABLES[0], [*runs[:2], lost], [])
    assert '| baseline | 8.19 | 8.20 | 2 + 1 diverged | 8.10–8.30 | none |' in text
    assert text.endswith('11 of 12 rows wait for runs.')
    assert '| baseline | 8.19 | none | 0 + 1 diverged |  | none |' in cards.table_text(paper.TABLES[0], [lost], [])


def test_what_diverged_has_no_weights_to_publish_and_no_error_in_a_card(tmp_path: Path) -> None:
    path = tmp_path / 'preresnet20.cifar10.safetensors'
    path.write_bytes(b'weights')
    lost = made_up(seed=5, error=90.0, diverged_epoch=3)
    with pytest.raises(PublishError, match=r'preresnet20\.cifar10\.safetensors: its run diverged'):
        results.shipped([{**lost, 'sha256': sha256_of_file(path)}], tmp_path)
    (file,) = results.shipped([one := made_up(sha256=sha256_of_file(path))], tmp_path)
    text = card.results_text(file, [one, lost])
    assert '| our runs of the recipe `paper`, median (range, n) | 8.00 (8.00–8.00, n = 1 + 1 diverged) |' in text
    assert '| 5 | diverged in epoch 3 |' in text and '90.00' not in text


def test_four_original_blocks_are_shown_at_both_learning_rates() -> None:
    name, table = 'preresnet20_nl_original_k4', paper.TABLES[0]
    tenth = made_up(name, error=40.0, recipe=results.recipe_for(name, 'short').to_dict())
    full = made_up(name, error=60.0, recipe=SHORT.to_dict())
    text = cards.table_text(table, [tenth, full], [], 'short')
    assert '\n| original, k = 4 | 15.02 | 40.00 | 1 | 40.00–40.00 | none |\n' \
           '| original, k = 4, learning rate 0.1 | not reported | 60.00 | 1 | 60.00–60.00 | none |\n' in text
    assert text.endswith('12 of 14 rows wait for runs.')
    assert 'in none of these tables: 0.' in cards.tables_text([tenth, full], [])
    said = cards.tables_text([made_up(other, recipe=tenth['recipe']) for other in ('preresnet20', f'{name[:-1]}2')], [])
    assert 'in none of these tables: 1.' in said, 'only the baseline has a row of that rate'
    assert '| baseline, learning rate 0.01 | not reported | 8.00 | 1 | 8.00–8.00 | none |' in said
    for recipe in ('paper', 'ft'):
        assert 'learning rate' not in cards.table_text(table, [made_up(name, recipe=PAPER.to_dict())], [], recipe)


def test_another_depth_has_a_table_of_its_own() -> None:
    waiting = cards.depth_text([made_up(error=8.5)])
    assert '| 20 = 9n + 2, as registered | 8.50 | 1 | 8.19 |' in waiting
    deeper = '| 29 = 9n + 2, counted another way |'
    assert f'{deeper} waits for its run | 0 | 8.19 |' in waiting
    runs = [made_up(error=8.5), made_up(error=7.5, model_kwargs=['depth=29'])]
    assert f'{deeper} 7.50 | 1 | 8.19 |' in cards.depth_text(runs)
    text = cards.depth_text([made_up(error=9.0), runs[1]])
    assert 'Depth 20 beside the paper’s: +0.81 percentage points, more than chance gives (± 0.56 for one run' in text
    assert 'Depth 29 beside the paper’s: -0.69 percentage points, more than chance gives (± 0.54 for one run' in text
    assert 'Depth 20 beside the paper’s: +0.31 percentage points, no more than chance can give' in waiting
    assert 'Depth 29' not in waiting
    text = cards.depth_text([made_up(error=9.0), {**made_up(error=9.2), 'seed': 1}])
    assert 'Depth 20 beside the paper’s: +0.91 percentage points between the medians.' in text and '±' not in text
    assert f'{deeper} waits' in cards.depth_text([made_up(model_kwargs=['depth=29'], limit=9)])
    assert f'{deeper} none | 0 + 1 diverged | 8.19 |' in cards.depth_text([{**runs[1], 'diverged_epoch': 2}])
    assert '| baseline | 8.19 | 8.50 | 1 |' in cards.table_text(paper.TABLES[0], runs, []), 'and is in no other'


def test_stable_stages_and_what_one_run_each_says() -> None:
    def run(error: float, *given: str) -> Record:
        return made_up('preresnet20_nl_proposed_k5', error=error, model_kwargs=list(given),
                       start={'name': 'preresnet20'}, recipe=FINE_TUNING.to_dict())

    assert cards.stable_text([]) == '4 of 4 rows wait for runs.'
    _, symmetric, stable, deep = cards.STABLE_ROWS.values()
    text = cards.stable_text([run(8.9), run(9.0, *symmetric), run(9.5, *stable)])
    assert '| symmetric, stable | 9.50 | 1 |' in text and '1 of 4 rows waits for runs.' in text
    assert 'What the guarantee costs: +0.50 percentage points, no more than chance can give (± 0.82 for' in text
    assert 'the depth' not in text
    text = cards.stable_text([run(9.0, *symmetric), run(9.5, *stable), run(8.0, *deep)])
    assert 'What the depth costs: -1.50 percentage points, more than chance gives (± 0.80' in text
    more = [{**run(error, *given), 'seed': 1} for error, given in ((9.2, symmetric), (9.4, stable))]
    text = cards.stable_text([run(9.0, *symmetric), run(9.5, *stable), *more])
    assert 'What the guarantee costs: +0.35 percentage points between the medians.' in text and '±' not in text


def test_a_curve_has_the_test_error_where_it_was_tested(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    sheets: list[Any] = []
    monkeypatch.setattr(drawing, '_save', lambda sheet, path, description: sheets.append(sheet))
    some: Record = {'train_loss': [2.0, 1.0, 0.5], 'train_error': [80.0, 40.0, 20.0]}
    for tested in ([None, 30.0, 25.0], [50.0, 30.0, 25.0]):
        folder._curve(made_up(**some, test_error=tested), tmp_path)
    assert (tmp_path / 'curve.csv').read_text().split() == [
        'epoch,train_loss,train_error,test_error', '1,2.0,80.0,50.0', '2,1.0,40.0,30.0', '3,0.5,20.0,25.0']
    folder._curve(made_up(**some, test_error=[None, 30.0, 25.0]), tmp_path)
    assert (tmp_path / 'curve.csv').read_text().split()[1] == '1,2.0,80.0,'
    (between, every, _) = ([line for line in sheet.axes[1].lines if line.get_label() == 'test'] for sheet in sheets)
    assert [*between[0].get_xdata()] == [2, 3] and [*between[0].get_ydata()] == [30.0, 25.0]
    assert between[0].get_marker() == 'o' and not every[0].get_marker().strip()


def test_unknown_fields_are_fine() -> None:
    assert results.deviations(made_up(kind='campaign', spectra=[])) == []


def test_median_and_range() -> None:
    errors = (7.4, 7.1, 7.3, 7.2)
    runs = [made_up(seed=seed, error=error) for seed, error in enumerate(errors)]
    assert results.summary(runs) == (4, 7.25, 7.1, 7.4)
    assert [one['final_error'] for one in results.median_records(runs)] == [7.2, 7.3]
    assert [one['final_error'] for one in results.median_records(runs[:3])] == [7.3]
    assert results.summary([]) is None and results.median_records([]) == []


def test_a_table_shows_what_is_measured_and_counts_the_rest() -> None:
    runs = [made_up(seed=seed, error=error) for seed, error in enumerate((8.4, 8.0, 8.1))]
    text = cards.tables_text([*runs, made_up('preresnet56', limit=9, mixed_precision='bf16', device='GPU X')], [])
    lines = text.splitlines()
    assert '| baseline | 8.19 | 8.10 | 3 | 8.00–8.40 | none |' in lines
    waiting = [line for line in lines if line.endswith('rows wait for runs.')]
    assert [line.partition(' ')[0] for line in waiting] == ['11', '9', '12', '9', '14'] and 'missing' not in text
    assert 'in none of these tables: 1.' in lines[0] and lines[0].endswith(
        'Runs of ours: 3 in float32; 1 in bfloat16 autocast, float32 weights; 1 on GPU X.')


def test_what_is_written_outside_the_markers_stays() -> None:
    begin, end = generated.markers('x', 'hub.some')
    assert (begin, end) == ('<!-- begin x: made by python -m hub.some -->', '<!-- end x -->')
    text = f'by hand\n{begin}\nold\n{end}\nby hand too\n'
    changed = generated.replace_block(text, 'x', 'hub.some', 'new')
    assert changed.startswith('by hand\n') and changed.endswith('\nby hand too\n')
    assert 'new' in changed and 'old' not in changed and changed == generated.replace_block(
        changed, 'x', 'hub.some', 'new')
    for broken in ('', text + text, text.replace('begin', 'start'), text.replace('<!-- end', '<!-- fin')):
        with pytest.raises(PublishError, match='once each'):
            generated.replace_block(broken, 'x', 'hub.some', 'new')


def test_a_card_is_made_anew_around_what_was_added() -> None:
    made = cards.update('', ('license: mit', 'text'))
    changed = cards.update(made + '\n## By hand\n', ('license: apache-2.0', 'other text'))
    assert changed.startswith('---\nlicense: apache-2.0\n---\n') and changed.endswith('\n## By hand\n')
    assert 'other text' in changed and 'mit' not in changed


def test_results_that_are_no_results(tmp_path: Path) -> None:
    path = tmp_path / 'results.jsonl'
    assert results.load(path) == []
    for line, message in (('{', 'line 2 is not a JSON object'), ('[]', 'line 2 is not a JSON object'),
                          ('{"seed": 1}', 'line 2 lacks architecture, best_epoch, best_error, dataset, final_error')):
        path.write_text(json.dumps(made_up()) + '\n' + line + '\n')
        with pytest.raises(PublishError, match=message):
            results.load(path)


@pytest.mark.parametrize('recipe', [
    None, 'paper', [], {'epochs': 164}, {**PAPER.to_dict(), 'speed': 1}, {**PAPER.to_dict(), 'epochs': '164'},
    {**PAPER.to_dict(), 'milestones': None}, {**PAPER.to_dict(), 'lr': [0.1]}])
def test_a_recipe_that_is_none(
        recipe: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / 'results.jsonl'
    path.write_text(f'{json.dumps(made_up())}\n{json.dumps(made_up(recipe=recipe))}\n')
    with pytest.raises(PublishError, match='line 2 is not about a run: '):
        results.load(path)
    monkeypatch.setattr(cards, 'load', lambda: results.load(path))
    assert cards.main(['--check']) == 2
    said = capsys.readouterr().err
    assert said.startswith('error: ') and said.count('\n') == 1


def test_weights_without_a_run_cannot_have_a_card(tmp_path: Path) -> None:
    (tmp_path / 'preresnet20.cifar10.safetensors').write_bytes(b'weights')
    sha256 = sha256_of_file(tmp_path / 'preresnet20.cifar10.safetensors')
    with pytest.raises(PublishError, match=f'no line of results.jsonl has its sha256 {sha256}'):
        results.shipped([made_up()], tmp_path)
    with pytest.raises(PublishError, match=r'says that these weights are preresnet56\.cifar100'):
        results.shipped([made_up('preresnet56', 'cifar100', sha256=sha256)], tmp_path)
    (file,) = results.shipped([made_up(sha256=sha256, seed=7)], tmp_path)
    assert (file.name, file.dataset, file.record['seed']) == ('preresnet20.cifar10', 'cifar10', 7)


def test_the_card_of_trained_weights(project: Project) -> None:
    """Read back by the client's own card class: the numbers are those of the run."""
    runs = [json.loads(line) for line in (project.root / 'hub/results.jsonl').read_text().splitlines()]
    for one in runs:
        text = (project.root / f'hub/models/{one["architecture"]}.cifar10.md').read_text()
        data: Any = ModelCard(text).data
        assert (data.library_name, data.license, data.pipeline_tag) == ('timm', 'apache-2.0', 'image-classification')
        assert 'transformers' not in data.tags, 'it would advertise a pipeline that fails without our import'
        (result,) = data.eval_results
        assert result.dataset_type == 'uoft-cs/cifar10' and result.metric_type == 'accuracy'
        assert result.metric_value == pytest.approx(100 - one['final_error'])
        assert f'| this file (seed 0) | {one["final_error"]:.2f} |' in text
        assert '**Not the paper’s recipe: epochs 2 in place of 164; batch size 40 in place of 128.**' in text
        assert one['sha256'] in text
        spectrum = '| block | negative in the top 32 |' in text
        assert spectrum == ('_nl_' in one['architecture']) == ('timm_nonlocal.inspect' in text)


def test_every_usage_block_starts_with_our_import(project: Project) -> None:
    """Of every card, of the model card and of the README."""
    texts = [*(project.root / 'hub/models').glob('*.md'), project.root / 'MODEL_CARD.md', ROOT / 'README.md']
    blocks = [block for path in texts for block in re.findall(r'```python\n(.*?)```', path.read_text(), re.DOTALL)]
    assert len(blocks) >= 3
    for block in blocks:
        assert block.startswith('import timm_nonlocal'), block


def test_the_usage_block_runs(project: Project, published: Any, tmp_path: Path) -> None:
    hub, _, _ = published
    repository = hub.store.repositories['alice/preresnet20_nl_proposed_k4.cifar10']
    card = repository.commits[repository.branches['main']].files['README.md'].data.decode()
    (block,) = re.findall(r'```python\n(.*?)```', card, re.DOTALL)
    use = "print(model(torch.stack([transform(Image.new('RGB', (32, 32)))])).shape)\n".replace(
        'torch.', '__import__("torch").').replace('Image.', '__import__("PIL.Image").Image.')
    done = project.run('-c', block + use, **project.client(hub, tmp_path))
    assert done.stdout == 'torch.Size([1, 10])\n', done.stderr


def test_drift_is_noticed_and_not_published(project: Project, tmp_path: Path) -> None:
    changed = Project(tmp_path / 'copy')
    shutil.copytree(project.root, changed.root)
    path = changed.root / 'hub/results.jsonl'
    runs = [json.loads(line) for line in path.read_text().splitlines()]
    runs[0]['final_error'] -= 5
    path.write_text('\n'.join(map(json.dumps, runs)) + '\n')
    (changed.root / 'hub/models/preresnet56.cifar100.md').write_text('nothing')
    drifted = changed.run('-c', 'from hub import cards, publish\n'
                                'print(cards.main(["--check"]), publish.main(["--namespace", "alice", "--dry-run"]))')
    assert drifted.stdout == 'alice/preresnet20.cifar10\n1 2\n'
    assert drifted.stderr.splitlines() == [
        'hub/models/preresnet56.cifar100.md has no weights: delete it',
        'MODEL_CARD.md is not what hub/results.jsonl and the weights make it: run python -m hub.cards',
        'hub/models/preresnet20.cifar10.md is not what hub/results.jsonl and the weights make it: run '
        'python -m hub.cards',
        'error: its card hub/models/preresnet20.cifar10.md is not what the results make it: run python -m hub.cards']


def test_time_that_runs_shared_is_said_to_be() -> None:
    alone, five = (card.training_text(made_up(seconds=7200, at_once=count)) for count in (1, 5))
    assert '| time | 2.00 hours |' in alone and '| time | 2.00 hours, of 5 runs side by side |' in five
    assert '| time | 1.5 minutes |' in card.training_text(made_up(seconds=90))


def test_weights_of_no_recipe_stand_beside_the_runs_of_one() -> None:
    other = made_up(recipe={**PAPER.to_dict(), 'epochs': 10})
    file = results.Shipped('preresnet20.cifar10', Path('x'), other['sha256'], other)
    text = card.results_text(file, [other, made_up(seed=1, error=7.0)])
    assert '| this file (seed 0) | 8.00 |' in text and '| 7.00 (7.00–7.00, n = 1) |' in text


def test_a_plain_backbone_starts_with_no_nonlocal_module() -> None:
    for name, said in (('preresnet20', False), ('preresnet20_nl_proposed_k5', True)):
        text = card.training_text(made_up(name, recipe=FINE_TUNING.to_dict(), start={'name': 'x', 'sha256': '0'}))
        assert '| starts from | `x` (sha256 `0`)' in text and ('as the identity |' in text) == said
