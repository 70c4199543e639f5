"""The models: backbones, the tasks on them, and their builders."""
