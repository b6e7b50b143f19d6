"""What models are fed: layouts, formats, samples, images, loaders and faults; a module per task on top."""
