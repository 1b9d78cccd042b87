"""What XLA's compilers for GPUs and TPUs make of the layer, without the device."""
