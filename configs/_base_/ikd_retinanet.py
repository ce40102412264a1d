# RetinaNet ResNet-50 from RetinaNet ResNeXt-101 64x4d with FGD and IKD, as published: 8 GPUs x 2 images, 24 epochs, learning
# rate 0.01 divided by 10 after epochs 16 and 22, augmentation and adversarial branch in the first 16 epochs.
# The published run reads adversarial images made offline by 5 steps of DI-FGSM; `carry` keeps a perturbation of each image and
# improves it at each visit by the one gradient that the distilled forward gives. It takes 13.6 GB of host memory for COCO, all
# ranks together. Crops on multiples of 8 pixels, the teacher's finest stride, leave what is kept on the teacher's grid. The
# paper's attack, in the step: --cfg-options model.adv.attack.mode=iterative model.adv.attack.memory=None
_base_ = "mmdet::retinanet/retinanet_r50_fpn_2x_coco.py"
custom_imports = dict(imports=["ikd_fast.mmdet"])

model = dict(
    _delete_=True,
    type="IKDDistiller",
    student=_base_.model,
    teacher_config="mmdet::retinanet/retinanet_x101-64x4d_fpn_1x_coco.py",
    teacher_ckpt="https://download.openmmlab.com/mmdetection/v2.0/retinanet/retinanet_x101_64x4d_fpn_1x_coco/"
    "retinanet_x101_64x4d_fpn_1x_coco_20200130-366f5af1.pth",
    losses=[dict(type="FGDLoss", preset="retinanet", source="neck.fpn_convs.{i}.conv")],
    adv=dict(
        beta=1e-5,
        attack=dict(type="OnlineDIFGSM", mode="carry", memory=dict(bits=4, stride=2, resolution="original")),
    ),
    # Its other defaults are the paper's: crop ratio 0.2, noise probability 0.3, area 32^2.
    augment=dict(type="AdaptiveFreqAug", crop_align=8),
    init_student=True,
    stop_at=dict(epoch=16),
)
# Each image on one rank for the whole run, since a rank keeps the perturbations of its images: 8 GPUs x 2 images are 16 slots.
train_dataloader = dict(sampler=dict(_delete_=True, type="KeyedSampler", slots=16))
optim_wrapper = dict(optimizer=dict(lr=0.01), clip_grad=dict(max_norm=35, norm_type=2))
