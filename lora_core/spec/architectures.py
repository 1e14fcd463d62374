"""What `target_modules` means where it is left out: the layers that each architecture's adapters usually go on.

    DEFAULT_TARGETS["llama"]      ("q_proj", "v_proj")

By the `model_type` of a model's configuration. For PEFT's architectures the names are PEFT's; those that follow are of
transformers 5, by the same rule: the projections of queries and values, or the one that holds both. Models of several parts (an
image encoder and a language model, say) are left out, since which part is meant has to be said.
"""

from __future__ import annotations

from types import MappingProxyType

_PEFT = {
    "q_proj v_proj": "bart gemma gemma2 gemma3_text gpt_neo gptj llama llama4 mistral mixtral opt qwen2 qwen3 stablelm",
    "q v": "mt5 t5",
    "query value": "bert electra layoutlm roberta xlm-roberta",
    "query_key_value": "RefinedWeb RefinedWebModel bloom chatglm falcon gpt_neox",
    "c_attn": "gpt2 gpt_bigcode",
    "c_proj c_attn": "btlm",
    "in_proj": "deberta",
    "key value receptance output": "rwkv",
    "q v q_proj v_proj": "blip-2",  # its language model is an OPT or a T5
    "q_proj k_proj v_proj o_proj": "nemotron_h",
    "q_proj v_proj fc1 fc2": "phi",
    "qkv_proj": "codegen",
    "query_proj value_proj": "deberta-v2",
    "r_proj k_proj v_proj o_proj key value": "rwkv7",
    "Wqkv": "mpt",
}
_TRANSFORMERS = {
    "q_proj v_proj": (
        "apertus arcee audio-spectrogram-transformer beit bigbird_pegasus biogpt bitnet blenderbot blenderbot-small "
        "cohere cohere2 cohere2_moe deit diffllama dinov2 dinov2_with_registers dinov3_vit ernie4_5 ernie4_5_moe eurobert "
        "exaone4 flex_olmo gemma4_text glm glm4 glm4_moe gpt_oss granite granitemoe granitemoeshared helium hubert lfm2 "
        "m2m_100 marian mbart minimax ministral3 modernbert-decoder moonshine nanochat nllb-moe olmo olmo2 olmo3 olmoe "
        "pegasus pegasus_x phimoe plbart qwen2_moe qwen3_moe seed_oss smollm3 solar_open speech_to_text starcoder2 trocr "
        "unispeech vaultgemma vit vit_mae vit_msn wav2vec2 wavlm whisper xglm"
    ),
    "q v": "longt5 mpnet switch_transformers umt5",
    "query value": (
        "albert bert-generation big_bird bros camembert canine convbert data2vec-text ernie layoutlmv3 lilt longformer "
        "luke markuplm megatron-bert mobilebert mra nystromformer rembert roberta-prelayernorm roformer splinter tapas "
        "xmod yoso xlm-roberta-xl"
    ),
    "query_key_value": "gpt_neox_japanese persimmon",
    "c_attn": "decision_transformer gpt-sw3 imagegpt openai-gpt",
    "q_lin v_lin": "distilbert flaubert xlm",
    "qkv_proj": "phi3",
    "query_proj value_proj": "prophetnet sew-d",
    "Wqkv": "modernbert",
}

#: {model_type: names for `target_modules`, or an expression}.
DEFAULT_TARGETS = MappingProxyType(
    {kind: tuple(names.split()) for table in (_PEFT, _TRANSFORMERS) for names, kinds in table.items() for kind in kinds.split()}
    | {"gemma4": r".*language_model\..*\.(q_proj|v_proj)"}
)
