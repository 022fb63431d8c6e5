"""Image classification: pictures from every source, and the small classifiers of the paper."""
