"""Reading the configuration: precedence, and one clear line for everything that is wrong with it."""

from collections.abc import Callable, Mapping
from pathlib import Path

import pytest

from paceline.server.config import (
    DEFAULT_TARGET,
    EngineConfig,
    ModelSpec,
    PacelineConfig,
    ServerConfig,
    SpeculationConfig,
    load_config,
)
from paceline.server.errors import ConfigError, UserError

Write = Callable[[str], Path]


@pytest.fixture
def write(tmp_path: Path) -> Write:
    def write(text: str) -> Path:
        path = tmp_path / "paceline.toml"
        path.write_text(text)
        return path

    return write


def complaint(
    path: Path | None = None,
    env: Mapping[str, str] | None = None,
    flags: Mapping[str, object] | None = None,
) -> str:
    """The message of the ConfigError; one line, as it is printed as one."""
    with pytest.raises(ConfigError) as caught:
        load_config(path, env or {}, flags or {})
    message = str(caught.value)
    assert "\n" not in message
    return message


def test_defaults_serve_the_default_model_without_speculation() -> None:
    config = load_config(None, {}, {})
    assert config == PacelineConfig(models=(ModelSpec(name=DEFAULT_TARGET, target=DEFAULT_TARGET),))
    assert config.server == ServerConfig(host="127.0.0.1", port=8000, log_format="text")
    assert config.engine == EngineConfig(max_batch_tokens=512, max_running=64, block_size=16)
    assert config.models[0].speculation.draft == "auto"


def test_every_table_of_a_file_is_read(write: Write) -> None:
    config = load_config(
        write("""
        [server]
        host = "0.0.0.0"
        api_keys = ["k1", "k2"]
        drain_seconds = 5
        [engine]
        threads = 3
        kv_cache_gib = 0.5
        prefix_caching = false
        [[models]]
        name = "small"
        target = "smollm2-135m-instruct"
        weights = "fp32"
        context_length = 1024
        [models.speculation]
        draft = "ngram"
        max_draft_tokens = 7
        verify = "token"
        [[models]]
        target = "path/to/Other.gguf"
        """),
        {},
        {},
    )
    assert config.server == ServerConfig(host="0.0.0.0", api_keys=("k1", "k2"), drain_seconds=5.0)
    assert config.engine == EngineConfig(threads=3, kv_cache_gib=0.5, prefix_caching=False)
    assert config.models == (
        ModelSpec(
            name="small",
            target="smollm2-135m-instruct",
            weights="fp32",
            context_length=1024,
            speculation=SpeculationConfig(draft="ngram", max_draft_tokens=7, verify="token"),
        ),
        ModelSpec(name="Other", target="path/to/Other.gguf"),
    )


@pytest.mark.parametrize(
    ("target", "name"),
    [
        ("smollm2-135m-instruct", "smollm2-135m-instruct"),
        ("hf:Org/Some-Model", "Some-Model"),
        ("hf:Org/Some-Model@v1/x", "Some-Model"),
        ("/models/qwen/", "qwen"),
        ("dir.with.dots/model.q4.gguf", "model.q4"),
        ("odd@home/model", "model"),
        ("/", "/"),
    ],
)
def test_a_model_is_named_after_its_target(target: str, name: str) -> None:
    assert load_config(None, {}, {"model": target}).models[0].name == name


def test_flag_beats_variable_beats_file_beats_default(write: Write) -> None:
    path = write('[server]\nport = 1\nhost = "h1"\nmax_queued_requests = 11\n')
    env = {"PACELINE_SERVER_PORT": "2", "PACELINE_SERVER_HOST": "h2", "HOME": "/"}
    server = load_config(path, env, {"port": "3", "host": None, "api_key": []}).server
    assert (server.port, server.host, server.max_queued_requests, server.log_format) == (3, "h2", 11, "text")


def test_model_flags_speak_about_the_only_model_of_the_file(write: Write) -> None:
    path = write('[[models]]\nname = "mine"\nspeculation = {max_draft_tokens = 2}\n')
    flags = {"model": "other", "draft": "ngram"}
    (model,) = load_config(path, {"PACELINE_MODEL_WEIGHTS": "fp32"}, flags).models
    assert model == ModelSpec(
        name="mine",
        target="other",
        weights="fp32",
        speculation=SpeculationConfig(draft="ngram", max_draft_tokens=2),
    )


def test_none_words_win_over_a_file(write: Write) -> None:
    path = write('[engine]\nthreads = 4\n[[models]]\ntarget = "a"\nspeculation = {draft = "d"}\n')
    config = load_config(path, {"PACELINE_ENGINE_THREADS": "auto"}, {"draft": "none"})
    assert config.engine.threads is None
    assert config.models[0].speculation.draft is None


def test_api_keys_from_variables() -> None:
    assert load_config(None, {"PACELINE_API_KEY": "a,b"}, {}).server.api_keys == ("a,b",)
    assert load_config(None, {"PACELINE_SERVER_API_KEYS": "a, b"}, {}).server.api_keys == ("a", "b")
    both = {"PACELINE_API_KEY": "a", "PACELINE_SERVER_API_KEYS": "a"}
    assert complaint(env=both).startswith("PACELINE_API_KEY: PACELINE_SERVER_API_KEYS is set as well")


def test_keys_are_not_shown() -> None:
    config = load_config(None, {"PACELINE_API_KEY": "sesame"}, {"admin_key": ["open"]})
    assert "sesame" not in repr(config)
    assert "open" not in repr(config)
    assert "sesame" not in complaint(env={"PACELINE_SERVER_API_KEYS": "sesame,,x"})


@pytest.mark.parametrize(
    ("text", "place", "hint"),
    [
        ("[server]\nprot = 1", "server.prot", 'did you mean "port"?'),
        ("[server]\nthreads = 1", "server.threads", 'did you mean "engine.threads"?'),
        ("[engine]\ndraft = 'a'", "engine.draft", 'did you mean "models.speculation.draft"?'),
        ("[serve]\nport = 1", "serve", 'did you mean "server"?'),
        ("[engine]\nzzz = 1", "engine.zzz", "known keys: kind, device, threads"),
        ("[[models]]\ntarget = 'a'\nspeculaton = {}", "models[0].speculaton", 'did you mean "speculation"?'),
        (
            "[[models]]\ntarget = 'a'\n[[models]]\ntarget = 'b'\n[models.speculation]\nmax_draft_token = 1",
            "models[1].speculation.max_draft_token",
            'did you mean "max_draft_tokens"?',
        ),
    ],
)
def test_an_unknown_key_names_its_place_and_the_nearest_known(
    write: Write, text: str, place: str, hint: str
) -> None:
    message = complaint(write(text))
    assert f"paceline.toml:{place}: unknown key; {hint}" in message


def test_an_unknown_variable_or_flag_names_the_nearest_known() -> None:
    assert 'did you mean "PACELINE_SERVER_PORT"?' in complaint(env={"PACELINE_SERVER_PROT": "1"})
    assert 'did you mean "max_running"?' in complaint(flags={"max_runing": 1})
    assert load_config(None, {"PACELINE_CACHE": "/x", "PACELINE_BASE_URL": "u"}, {}) == load_config(
        None, {}, {}
    )


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("[server]\nport = '80'", 'server.port: expected a whole number from 0 to 65535, got "80"'),
        ("[server]\nport = true", "server.port: expected a whole number from 0 to 65535, got true"),
        ("[server]\nport = 65536", "server.port: expected a whole number from 0 to 65535, got 65536"),
        ("[server]\nhost = ''", 'server.host: expected a text that is not empty, got ""'),
        ("[server]\ndrain_seconds = inf", "server.drain_seconds: expected a number of at least 0, got inf"),
        ("[server]\ndrain_seconds = -1", "server.drain_seconds: expected a number of at least 0, got -1"),
        ("[server]\napi_keys = 'k'", "server.api_keys: expected a list of texts that are not empty"),
        ("[server]\nlog_format = 'xml'", 'server.log_format: expected "text" or "json", got "xml"'),
        ("[engine]\nprefix_caching = 1", "engine.prefix_caching: expected true or false, got 1"),
        ("[engine]\nkv_cache_gib = 0", 'engine.kv_cache_gib: expected a number above 0 or "auto", got 0'),
        ("[engine]\ndevice = 'gpu'", 'engine.device: expected "auto", "cpu" or "cuda", got "gpu"'),
        ("[engine]\nthreads = 0", 'engine.threads: expected a whole number from 1 to 1024 or "auto", got 0'),
        ("server = 3", "server: expected a table, got 3"),
        ("models = 3", "models: write one [[models]] table per model"),
        ("[models]\ntarget = 'a'", "models: write one [[models]] table per model"),
        ("[[models]]\nname = 'a'", "models[0]: target is missing"),
        ("[[models]]\ntarget = 'a'\nname = ' '", "models[0].name: expected a text that is not empty"),
        (
            "[[models]]\ntarget = 'a'\nweights = 'int4'",
            'models[0].weights: "int4" is not available in this version',
        ),
        ("[[models]]\ntarget = 'a'\n[[models.steering]]", "models[0].steering[0]: name is missing"),
        ("[[models]]\ntarget = 'a'\nspeculation = 1", "models[0].speculation: expected a table, got 1"),
    ],
)
def test_a_bad_value_says_what_would_be_right(write: Write, text: str, message: str) -> None:
    assert f"paceline.toml:{message}" in complaint(write(text))


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("policy = 'adapted'", 'expected "adaptive" or "fixed", got "adapted"'),
        ("min_lenience = 0", "expected a number above 0 and at most 1, got 0"),
        ("min_lenience = 1.5", "expected a number above 0 and at most 1, got 1.5"),
        ("lenience_form = 'square'", 'expected "exp", "lin" or "sq", got "square"'),
        ("max_draft_tokens = 0", "expected a whole number from 1 to 32, got 0"),
        ("verify = 'both'", 'expected "block" or "token", got "both"'),
        ("draft = 'ngram'\nngram = false", 'draft "ngram" contradicts ngram = false'),
    ],
)
def test_a_bad_speculation_table(write: Write, line: str, message: str) -> None:
    text = complaint(write(f"[[models]]\ntarget = 'a'\n[models.speculation]\n{line}"))
    assert "paceline.toml:models[0].speculation." in text
    assert message in text


def test_model_names_are_unique(write: Write) -> None:
    path = write("[[models]]\ntarget = 'x/a.gguf'\n[[models]]\ntarget = 'b'\nname = 'a'\n")
    assert 'models[1].name: models[0] is called "a" as well' in complaint(path)


@pytest.mark.parametrize(
    ("env", "flags", "place"),
    [({}, {"draft": "ngram"}, "--draft"), ({"PACELINE_MODEL_TARGET": "c"}, {}, "PACELINE_MODEL_TARGET")],
)
def test_model_flags_are_refused_beside_several_models(
    write: Write, env: dict[str, str], flags: dict[str, object], place: str
) -> None:
    path = write("[[models]]\ntarget = 'a'\n[[models]]\ntarget = 'b'\n")
    message = complaint(path, env, flags)
    assert message.startswith(f"{place}: ")
    assert "lists 2 models" in message


def test_a_weak_source_is_checked_even_where_a_stronger_one_wins(write: Write) -> None:
    assert "server.port" in complaint(write("[server]\nport = -1"), {}, {"port": "1"})


def test_a_kubernetes_service_variable_is_explained() -> None:
    message = complaint(
        env={"PACELINE_SERVER_PORT": "tcp://10.0.0.1:8000", "PACELINE_SERVER_SERVICE_HOST": "h"}
    )
    assert "Kubernetes" in message
    assert "enableServiceLinks" in message


def test_files_that_cannot_be_read(write: Write, tmp_path: Path) -> None:
    assert "there is no file" in complaint(tmp_path / "none.toml")
    assert "cannot be read: Is a directory" in complaint(tmp_path)
    assert "not valid TOML" in complaint(write("[server\n"))
    (tmp_path / "latin.toml").write_bytes(b'[server]\nhost = "\xe9"\n')
    assert "not valid TOML" in complaint(tmp_path / "latin.toml")


def test_a_config_error_is_a_usage_error() -> None:
    assert (UserError("x").exit_code, ConfigError("x").exit_code) == (1, 2)
