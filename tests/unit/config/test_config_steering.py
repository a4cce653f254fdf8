"""``[[models.steering]]``: what a table may say, and one line for what contradicts its mode."""

from pathlib import Path

import pytest

from paceline.server.config import load_config
from paceline.server.config.schema import SteeringConfig
from paceline.server.errors import ConfigError

PROXY = 'name = "sql"\nexpert = "e"\nanti_expert = "a"\n'
CFG = 'name = "stay"\nmode = "cfg"\nanti_expert = "self"\nanti_prompt = ""\n'
AMPLIFY = PROXY + 'mode = "amplify"\n'


def load(tmp_path: Path, *tables: str, model: str = "") -> tuple[SteeringConfig, ...]:
    path = tmp_path / "paceline.toml"
    steering = "".join(f"[[models.steering]]\n{table}" for table in tables)
    path.write_text(f'[[models]]\ntarget = "t"\n{model}\n{steering}', encoding="utf-8")
    return load_config(path, {}, {}).models[0].steering


def test_all_modes(tmp_path: Path) -> None:
    proxy, cfg, amplify = load(
        tmp_path,
        PROXY + "alpha = 1.5\nlimits = [0.5, 2]\n",
        CFG + 'support = "top_p"\nsupport_top_p = 0.8\n',
        AMPLIFY.replace("sql", "more") + 'beta = 2\nexpert_template = "own"\nresponse_prefix = "A:"\n',
    )
    assert (proxy.mode, proxy.alpha, proxy.limits, proxy.support) == ("proxy", 1.5, (0.5, 2.0), "full")
    assert (cfg.mode, cfg.anti_prompt, cfg.support_top_p, cfg.alpha) == ("cfg", "", 0.8, None)
    assert (amplify.beta, amplify.expert_template, amplify.response_prefix) == (2.0, "own", "A:")


@pytest.mark.parametrize(
    ("tables", "message"),
    [
        (('name = "x"\n',), "[0]: anti_expert is missing"),
        ((PROXY.replace('expert = "e"\n', ""),), '[0]: expert is missing, which mode "proxy" needs'),
        ((CFG + 'expert = "e"\n',), '[0].expert: has no effect in mode "cfg"'),
        ((CFG + "beta = 1\n",), '[0].beta: has no effect in mode "cfg"'),
        ((AMPLIFY + "alpha = 1\n",), '[0].alpha: has no effect in mode "amplify"'),
        ((CFG.replace('anti_prompt = ""\n', ""),), "differs from the target by anti_prompt only"),
        ((CFG + 'support = "expert_top_p"\n',), '[0].support: mode "cfg" has no expert'),
        ((PROXY + "support_top_p = 0.5\n",), "[0].support_top_p: has no effect"),
        ((PROXY + "alpha = 4.5\n",), "[0].alpha: 4.5 is outside of limits [0, 4]"),
        ((PROXY + "limits = [2, 1]\n",), "[0].limits: expected two numbers, the lesser first"),
        ((PROXY + "limits = 2\n",), "[0].limits: expected two numbers"),
        ((PROXY + "alpha = nan\n",), "[0].alpha: expected a number"),
        ((PROXY + "alfa = 1\n",), '[0].alfa: unknown key; did you mean "alpha"?'),
        ((PROXY + 'mode = "lift"\n',), '[0].mode: expected "proxy", "amplify" or "cfg"'),
        ((PROXY, PROXY), '[1].name: two pairs are called "sql"'),
    ],
)
def test_a_bad_table_says_what_and_where(tmp_path: Path, tables: tuple[str, ...], message: str) -> None:
    with pytest.raises(ConfigError) as caught:
        load(tmp_path, *tables)
    assert f"models[0].steering{message}" in str(caught.value) or message in str(caught.value)


def test_the_expert_drafts_only_where_there_is_one(tmp_path: Path) -> None:
    draft = '[models.speculation]\ndraft = "expert"\n'
    assert load(tmp_path, PROXY, model=draft)
    with pytest.raises(
        ConfigError, match=r'speculation\.draft: draft "expert" needs a \[\[models\.steering\]\] table'
    ):
        load(tmp_path, CFG, model=draft)
