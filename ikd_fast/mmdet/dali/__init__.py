"""DALI in mmdet's Runner: ``train_dataloader=dict(type='DALIDetLoader', ...)``."""
