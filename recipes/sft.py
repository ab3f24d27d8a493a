# /// script
# requires-python = ">=3.10"
# dependencies = ["mashup-callback[cli,plot]"]
#
# [tool.uv.sources]
# mashup-callback = { path = ".." }
# ///
"""Supervised fine-tuning that starts from a mashup: TRL's SFT script plus `MashupArguments`.

    python recipes/sft.py --config recipes/sft/gemma3_1b_arc_easy.yaml
    accelerate launch --config_file recipes/accelerate/ddp.yaml recipes/sft.py --config recipes/sft/....yaml

Every field of `ScriptArguments`, `SFTConfig`, `ModelConfig` and `MashupArguments` can stand in the YAML file or on the
command line.
"""

from datasets import load_dataset
from trl import (
    ModelConfig,
    ScriptArguments,
    SFTConfig,
    SFTTrainer,
    TrlParser,
    get_peft_config,
    get_quantization_config,
)

from mashup_callback import MashupArguments


CONFIGS = (ScriptArguments, SFTConfig, ModelConfig, MashupArguments)


def main(arguments: list[str] | None = None) -> SFTTrainer:
    """Trains as the arguments (the command line's by default) say, and returns the trainer."""
    script, training, model, mashup = TrlParser(CONFIGS).parse_args_and_config(arguments)
    callback = mashup.callback()
    dataset = load_dataset(script.dataset_name, name=script.dataset_config, streaming=script.dataset_streaming)
    training.model_init_kwargs = {
        "revision": model.model_revision,
        "attn_implementation": model.attn_implementation,
        "dtype": model.dtype,
        **(training.model_init_kwargs or {}),
    }
    if quantization := get_quantization_config(model):
        training.model_init_kwargs["quantization_config"] = quantization
    trainer = SFTTrainer(
        model=model.model_name_or_path,
        args=training,
        train_dataset=dataset[script.dataset_train_split],
        eval_dataset=dataset[script.dataset_test_split] if training.eval_strategy != "no" else None,
        peft_config=get_peft_config(model),
        callbacks=[callback] if callback else [],
    )
    trainer.train(resume_from_checkpoint=training.resume_from_checkpoint)
    trainer.save_model(training.output_dir)
    if training.push_to_hub:
        trainer.push_to_hub(dataset_name=script.dataset_name)
    # Without it a process that saves nothing can hang in gloo's destructor (pytorch/pytorch#56297).
    trainer.accelerator.wait_for_everyone()
    trainer.accelerator.end_training()
    return trainer


if __name__ == "__main__":
    main()
