"""
What is said of a dataset or a model on the Hub: citations, links, versions; the templates of the cards are beside it.
"""

import json
import re
from importlib.metadata import PackageNotFoundError, distribution
from importlib.resources import files
from pathlib import Path


CITATIONS = {
    "2509.15157": ("zhao2025mind", "Mind the Gap: Data Rewriting for Stable Off-Policy Supervised Fine-Tuning", "Zhao, Shiwan and Zhao, Xuyang and Zhou, Jiaming and Kong, Aobo and Li, Qicheng and Qin, Yong"),
    "2602.11220": ("wang2026patch", "Patch the Distribution Mismatch: RL Rewriting Agent for Stable Off-Policy SFT", "Wang, Jiacheng and Jian, Ping and Yang, Zhen and Chen, Zirong and Liao, Keren and Guo, Zhongbin"),
    "2508.05629": ("wu2025generalization", "On the Generalization of SFT: A Reinforcement Learning Perspective with Reward Rectification", "Wu, Yongliang and Zhou, Yizhou and Zhou, Ziheng and Peng, Yingzhe and Ye, Xinyu and Hu, Xinting and Zhu, Wenbo and Qi, Lu and Yang, Ming-Hsuan and Yang, Xu"),
    "2510.00526": ("li2025beyond", "Beyond Log Likelihood: Probability-Based Objectives for Supervised Fine-Tuning across the Model Capability Continuum", "Li, Gaotang and Qiu, Ruizhong and Chen, Xiusi and Ji, Heng and Tong, Hanghang"),
    "2507.12856": ("qin2025supervised", "Supervised Fine Tuning on Curated Data is Reinforcement Learning (and can be improved)", "Qin, Chongli and Springenberg, Jost Tobias"),
    "2508.17784": ("zhu2025proximal", "Proximal Supervised Fine-Tuning", "Zhu, Wenhong and Xie, Ruobing and Wang, Rui and Sun, Xingwu and Wang, Di and Liu, Pengfei"),
    "2509.23753": ("zhu2025anchored", "Anchored Supervised Fine-Tuning", "Zhu, He and Su, Junyou and Lai, Peng and Ma, Ren and Zhang, Wenjia and Yang, Linyi and Chen, Guanhua"),
    "2601.02151": ("diao2026entropy", "Entropy-Adaptive Fine-Tuning: Resolving Confident Conflicts to Mitigate Forgetting", "Diao, Muxi and Yang, Lele and Gong, Wuxuan and Zhang, Yutong and Yan, Zhonghao and Han, Yufei and Liang, Kongming and Xu, Weiran and Ma, Zhanyu"),
    "2503.14286": ("leroux2025tapered", "Tapered Off-Policy REINFORCE: Stable and efficient reinforcement learning for LLMs", "Le Roux, Nicolas and Bellemare, Marc G. and Lebensold, Jonathan and Bergeron, Arnaud and Greaves, Joshua and Fréchette, Alex and Pelletier, Carolyne and Thibodeau-Laufer, Eric and Toth, Sándor and Work, Sam"),
    "2601.09195": ("liu2026profit", "ProFit: Leveraging High-Value Signals in SFT via Probability-Guided Token Selection", "Liu, Tao and Wu, Taiqiang and Yang, Runming and Sun, Shaoning and Wang, Junjie and Yang, Yujiu"),
    "2602.01058": ("zhang2026good", "Good SFT Optimizes for SFT, Better SFT Prepares for Reinforcement Learning", "Zhang, Dylan and Xu, Yufeng and Wang, Haojin and Chen, Qingzhi and Peng, Hao"),
}  # fmt: skip


def bibtex(arxiv_id: str) -> str:
    """The BibTeX entry of one of the papers in `CITATIONS`."""
    name, title, authors = CITATIONS[arxiv_id]
    return (
        f"@misc{{{name},\n  title         = {{{{{title}}}}},\n  author        = {{{authors}}},\n  year          = {{20{arxiv_id[:2]}}},\n"
        f"  eprint        = {{{arxiv_id}}},\n  archivePrefix = {{arXiv}},\n  url           = {{https://arxiv.org/abs/{arxiv_id}}}\n}}"
    )


def versions(*packages: str) -> str:
    """`name version` of each package that is installed, with the commit where it was installed from git."""
    found = []
    for name in packages:
        try:
            installed = distribution(name)
        except PackageNotFoundError:
            continue
        commit = json.loads(installed.read_text("direct_url.json") or "{}").get("vcs_info", {}).get("commit_id")
        found.append(f"{name} {installed.version}" + (f" ({commit[:12]})" if commit else ""))
    return ", ".join(found)


def public_name(name: str) -> str:
    """A Hub id as it is; of a local path only its last part, as the rest is nobody's business."""
    return name if is_hub_id(name) else name.rstrip("/").split("/")[-1]


def link(name: str | None, kind: str, on_hub: bool | None = None) -> str | None:
    """Markdown for a Hub id, or for a local path, which is shown as [`public_name`] gives it."""
    if not name:
        return None
    if is_hub_id(name) if on_hub is None else on_hub:
        return f"[{name}](https://huggingface.co/{kind}{name})"
    return f"`{name.rstrip('/').split('/')[-1]}` (local)"


def is_hub_id(name: str | None) -> bool:
    """Whether `name` can be a Hub id (`owner/name` or `name`) and is no local path."""
    from huggingface_hub.utils import HFValidationError, validate_repo_id

    if not name or Path(name).exists():
        return False
    try:
        validate_repo_id(name)
    except HFValidationError:
        return False
    return True


def fence(text: str) -> str:
    """`text` as a Markdown code block, whatever backticks are in it."""
    ticks = "`" * max(3, 1 + max(map(len, re.findall("`+", text)), default=0))
    return f"{ticks}text\n{text}\n{ticks}"


def template_path(name: str) -> str:
    """The file of one of the card templates: `dataset_card`, `model_card` or `agent_card`."""
    return str(files(__package__) / "templates" / f"{name}.md")
