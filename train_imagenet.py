"""Train a ResNet with STACEY: accelerate launch train_imagenet.py [--config FILE.yaml] [--section.name value ...]."""

from stacey_dist.extras import missing_extras_reported


def main() -> None:
    """Read the settings, build the parts, train, export."""
    from stacey_dist.training.command_line import parse
    from stacey_dist.training.image_config import ImageConfig, validate

    config = parse(ImageConfig)

    from stacey_dist.training.run import start, user_errors

    with user_errors("train_imagenet.py"):
        validate(config)
        from stacey_dist.training import images
        from stacey_dist.training.engine import build_engine
        from stacey_dist.training.launch import ZERO_REDUNDANCY, requested_engine
        from stacey_dist.training.loop import train
        from stacey_dist.training.optimizers import build_optimizer

        run = start(config)
        data = images.prepare_data(run)
        model = images.build_model(run, data)
        by_owner = requested_engine() == ZERO_REDUNDANCY
        optimizer = build_optimizer(model, config.optimizer, config.seed, by_owner=by_owner)
        task = images.ImageClassification(run, data, model)
        engine = build_engine(run, model, optimizer)
        checkpoint = train(run, task, engine)
        task.close()
        run.report(f"model for transformers: {images.export(run, checkpoint)}")
        engine.close()


if __name__ == "__main__":
    with missing_extras_reported("train_imagenet.py"):
        main()
