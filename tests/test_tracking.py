"""Runs in an MLflow server: sent as they end, whatever their end, and never at a run's expense."""
import json
import nbformat.v4 as v4, pytest
from fer_core.artifacts import FerError, Run
from fer_core.runs.stage import run_stage
from fer_core.runs.tracking import track

mlflow = pytest.importorskip('mlflow')


@pytest.fixture
def stages(tmp_path, monkeypatch): # a stage that ends or fails in a moment
    body = "from fer_core.artifacts import FerError\nfrom fer_core.runs.stage import begin\nrun = begin('teacher', globals())\nif lr > 1: raise FerError('nan_loss', 'the loss is not finite')\nrun.record(metrics={'teacher/test': {'n': 9, 'split': 'test', 'in_sample': False, 'accuracy': lr}})\nrun.finish()"
    nb = v4.new_notebook(cells=[v4.new_code_cell("lr: float = 0.1\nrun_dir: str = ''", metadata={'tags': ['parameters']}), v4.new_code_cell(body)], metadata={'kernelspec': {'name': 'python3', 'display_name': 'python3', 'language': 'python'}})
    (tmp_path/'stages').mkdir()
    (tmp_path/'stages'/'teacher.ipynb').write_text(json.dumps(nb))
    monkeypatch.setenv('FER_CORE_STAGES', str(tmp_path/'stages'))
    return tmp_path


def entries(uri):
    client = mlflow.MlflowClient(uri)
    return {e.data.tags['fer_core.run']: e for e in client.search_runs([client.get_experiment_by_name('fer_core').experiment_id])}


def test_runs_send_themselves_as_they_end(stages, monkeypatch):
    uri = f'sqlite:///{stages}/mlflow.db'
    monkeypatch.setenv('FER_CORE_MLFLOW', uri)
    one = run_stage('teacher', {'lr': .5}, stages/'runs')
    with pytest.raises(FerError): run_stage('teacher', {'lr': 2.}, stages/'runs')
    found = entries(uri)
    assert len(found) == 2
    told = found[one.folder.name]
    assert told.info.status == 'FINISHED' and told.data.metrics['test/accuracy'] == .5 and told.data.params['lr'] == '0.5' and told.info.end_time >= told.info.start_time
    failed, = (e for name, e in found.items() if name != one.folder.name)
    assert failed.info.status == 'FAILED' and failed.data.tags['fer_core.code'] == 'nan_loss'
    assert track([p.parent for p in (stages/'runs').glob('*/run.json')], uri) == {'new': 0, 'changed': 0, 'there': 2}


def test_a_server_that_does_not_answer_costs_no_run(stages, monkeypatch, capsys):
    monkeypatch.setenv('FER_CORE_MLFLOW', 'http://127.0.0.1:9')
    monkeypatch.setenv('MLFLOW_HTTP_REQUEST_MAX_RETRIES', '0')
    run = run_stage('teacher', {'lr': .5}, stages/'runs')
    assert run.manifest.status == 'accepted' and f'{run.folder.name} is not tracked: MLflow at http://127.0.0.1:9' in capsys.readouterr().err


def test_a_run_cut_while_it_is_sent_is_sent_again_whole(tmp_path, monkeypatch):
    uri, run = f'sqlite:///{tmp_path}/mlflow.db', Run.create(tmp_path/'2026-01-01-teacher-a1b2c3', 'teacher', {'lr': .1})
    run.record(metrics={'mean, of 2/test': {'n': 9, 'split': 'test', 'in_sample': False, 'accuracy': .6}})
    run.finish()
    whole = mlflow.MlflowClient.log_batch
    def cut(self, *args, **kw):
        if 'params' in kw: raise ConnectionError('the line is cut')
        return whole(self, *args, **kw)
    with monkeypatch.context() as m:
        m.setattr(mlflow.MlflowClient, 'log_batch', cut)
        with pytest.raises(FerError, match='the line is cut'): track([run.folder], uri)
    assert track([run.folder], uri) == {'new': 0, 'changed': 1, 'there': 0}
    told = entries(uri)[run.folder.name]
    assert told.data.params == {'lr': '0.1'} and told.data.metrics['test/accuracy'] == .6
    assert len(mlflow.MlflowClient(uri).search_runs([told.info.experiment_id])) == 1
