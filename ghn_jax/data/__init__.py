"""Images: handwritten digits, CIFAR-10, ImageNet, and their augmentation."""
