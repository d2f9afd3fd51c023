"""Secrets are told from tokens of a text by whole words of a name."""

from __future__ import annotations

import pytest

from samestep.launcher.cluster.kubernetes import manifests
from samestep.launcher.cluster.kubernetes_config import KubernetesConfig
from samestep.launcher.cluster.kubernetes_names import variables
from samestep.launcher.command_line.argv import Recipe
from samestep.launcher.contract import UsageError
from samestep.launcher.secret_names import is_secret, without_secrets

SECRETS = """
HF_TOKEN HUGGING_FACE_HUB_TOKEN WANDB_API_KEY AWS_SECRET_ACCESS_KEY AWS_SESSION_TOKEN DB_PASSWORD PGPASSWORD MYSQL_PWD
PASSWD GITHUB_PAT PRIVATE_KEY CREDENTIALS CLIENT_SECRET APIKEY HFTOKEN --token --hf-token --hfToken --HFToken --apiKey
--api-key --hub_token --db_password --wandb-api-key --model.hub-token --secret --passphrase --ssh-key
""".split()
HARMLESS = """
TOKENIZERS_PARALLELISM MAX_TOKENS PWD OLDPWD PATH KEYBOARD OMP_NUM_THREADS DB_PASSWORD_FILE PRIVATE_KEY_PATH
GOOGLE_CREDENTIALS_FILE --tokenizer --max-tokens --num-tokens --tokens-per-batch --token-budget --pad-token --padToken
--bos-token --eos_token --unk-token --mask-token --sep-token --cls-token --special-token --loss-per-token --key --patch
--primary-key --secretary --path -- -
""".split()


@pytest.mark.parametrize("name", SECRETS)
def test_names_of_secrets(name):
    assert is_secret(name)


@pytest.mark.parametrize("name", HARMLESS)
def test_names_of_what_anybody_may_see(name):
    assert not is_secret(name)


def test_a_cluster_takes_harmless_names_and_refuses_secrets_in_variables_and_options():
    text = "TOKENIZERS_PARALLELISM=false,MAX_TOKENS=3"
    assert variables("--env", text) == {"TOKENIZERS_PARALLELISM": "false", "MAX_TOKENS": "3"}
    config = KubernetesConfig(image="registry.example/samestep:0.1.0", env=text)
    assert manifests(config, Recipe("r.py", ("--tokenizer", "bpe", "--pad-token", "0")))
    with pytest.raises(UsageError, match="but --hf-token is an argument: manifests are stored and shown") as refused:
        manifests(config, Recipe("r.py", ("--hf-token=hunter2",)))
    assert "hunter2" not in str(refused.value)


def test_values_of_secrets_alone_are_left_out_of_what_is_passed_on():
    values = {"hf_token": "hunter2", "api_key": None, "pad_token": "<pad>", "max_tokens": 3, "db": {"password": "x"}}
    shown = {"hf_token": "(hidden)", "db": {"password": "(hidden)"}}
    assert without_secrets(values) == values | shown
