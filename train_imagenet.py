"""Train a ResNet with STACEY: accelerate launch train_imagenet.py [--config FILE.yaml] [--section.name value ...]."""

from stacey_dist.extras import missing_extras_reported

if __name__ == "__main__":
    with missing_extras_reported("train_imagenet.py"):
        from stacey_dist.training.launchers import IMAGES

        IMAGES.main()
