"""Pretrain a LLaMA with STACEY: accelerate launch train_llm.py [--config FILE.yaml] [--section.name value ...]."""


def main() -> None:
    """Read the settings, build the parts, train, export."""
    from stacey_dist.training.command_line import parse
    from stacey_dist.training.config import LLMConfig, validate

    config = parse(LLMConfig)

    from stacey_dist.training.run import start, user_errors

    with user_errors("train_llm.py"):
        validate(config)
        from stacey_dist.training import llm
        from stacey_dist.training.loop import train
        from stacey_dist.training.optimizers import build_optimizer

        run = start(config)
        data = llm.prepare_data(run)
        model = llm.build_model(run, data)
        optimizer = build_optimizer(model, config.optimizer, config.seed)
        train(run, llm.LanguageModeling(run, data, model), model, optimizer)
        exported = llm.export(run, model, data)
        run.say(f"\nsample: {llm.sample(run, model, data)}\n")
        run.report(exported)
        run.accelerator.end_training()


if __name__ == "__main__":
    main()
