"""Pretrain a LLaMA with STACEY: accelerate launch train_llm.py [--config FILE.yaml] [--section.name value ...]."""

from stacey_dist.extras import missing_extras_reported


def main() -> None:
    """Read the settings, build the parts, train, export."""
    from stacey_dist.training.command_line import parse
    from stacey_dist.training.llm_config import LLMConfig, validate

    config = parse(LLMConfig)

    from stacey_dist.training.run import start, user_errors

    with user_errors("train_llm.py"):
        validate(config)
        from stacey_dist.training import llm
        from stacey_dist.training.engine import build_engine
        from stacey_dist.training.launch import ZERO_REDUNDANCY, requested_engine
        from stacey_dist.training.loop import train
        from stacey_dist.training.optimizers import build_optimizer

        run = start(config)
        data = llm.prepare_data(run)
        model = llm.build_model(run, data)
        by_owner = requested_engine() == ZERO_REDUNDANCY
        optimizer = build_optimizer(model, config.optimizer, config.seed, by_owner=by_owner)
        task = llm.LanguageModeling(run, data, model)
        engine = build_engine(run, model, optimizer)
        checkpoint = train(run, task, engine)
        exported = llm.export(run, data, checkpoint)
        run.say(f"\nsample: {llm.sample(run, engine, data)}\n")
        run.report(f"model and tokenizer for transformers: {exported}")
        engine.close()


if __name__ == "__main__":
    with missing_extras_reported("train_llm.py"):
        main()
