"""The words by which a sentence shows one of the four behaviours, in English and Chinese.

The behaviours of QwenLong-L1's figure 7 (arXiv 2505.17667, section 4.3), as we define them:

    grounding         the writer recalls something from the given context and says so: names the document, table or page
                      that states it, or quotes it word for word
    subgoal_setting   the writer sets a step towards the answer before taking it: a plan, a numbered step, "first I need to"
    backtracking      the writer gives up or revises what was just thought: "wait, no", "I misread", another approach
    verification      the writer checks a result or a reading that is there already: "let me double-check", "this matches"

Cues are alternatives of fixed words with bounded gaps, so that matching is linear. A stretch of words is one cue's: they
are tried in the order of `PATTERN`, and what `neither` takes (the same words in another sense, "wait for the report", "a
check for $500", "no need to verify") is nobody's. It gives up on what only understanding can tell, irony and paraphrase:
that is what the judge is for.
"""

from __future__ import annotations

import re

BEHAVIOURS: tuple[str, ...] = ("grounding", "subgoal_setting", "backtracking", "verification")

VERSION = 1
"""Raised with every change of a cue: counts of different lexicons are not compared."""

QUOTE = "\x02"
"""Stands in a sentence for a quotation, whose own words show nothing of the writer's."""

# What a context is called, and its parts.
_SOURCE = (
    r"(?:text|document|doc|report|passage|article|context|paragraph|excerpt|filing|contract|agreement|paper|abstract|story"
    r"|novel|script|transcript|table|chart|figure|section|appendix|footnote|notes?|page|exhibit|schedule|source|material"
    r"|balance sheet|income statement|cash flow statement|statements?|provided information|given information|data"
    r"|10-[kq]|introduction|conclusion|chapter)"
)
_THE = (
    r"(?:the|this|that|its|our|their|these|those)"
    r"(?: (?:first|second|third|fourth|last|next|same|given|provided|annual|financial|original|above|following|previous|final|company's)){0,2}"
)
_PART = r"(?:table|note|section|page|figure|exhibit|item|chapter|appendix|paragraph|passage|document|line|row) (?:\d{1,4}|[ivx]{1,5}|[a-d])\b"
_STATES = (
    r"(?:says?|said|states?|stated|mentions?|mentioned|shows?|reads?|notes?|indicates?|describes?|specif(?:y|ies)|reports?"
    r"|lists?|gives|explains?|tells us|provides|records|discloses|clarif(?:y|ies)|saying|stating|mentioning)"
)
_STATED = r"(?:stated|mentioned|said|noted|described|written|given|reported|listed|specified|shown|disclosed)"
_LOOK = r"(?:looking at|going back to|turning to|going through|reading(?: through)?|scanning|returning to|referring to)"
_ANY_SOURCE = rf"(?:{_THE} {_SOURCE}|{_PART})"

_WE = r"(?:i|we)"
_LETS = r"(?:let me|let's|let us|let’s)"
_WILL = rf"(?:{_LETS}|{_WE}(?:'ll|’ll| will| need to| have to| should| must| can| could| want to)|i'm going to|i’m going to)"
_SOON = r"(?: (?:first|now|next|then|also|just|quickly|begin by|start by|try to|carefully|again))?"
_CHECK = (
    r"(?:double[- ]?check|re-?check|cross[- ]?check|verify|re-?verify|check|confirm|validate|re-?read|re-?calculate"
    r"|re-?compute|re-?count|make sure|look again|go over (?:this|that|it) again|sanity[- ]check|test (?:this|that|it))"
)
_DO = (
    r"(?:find|identify|locate|compute|calculate|determine|figure out|work out|list|break|look for|look up|look at|extract"
    r"|compare|collect|gather|search for|get|add|subtract|divide|multiply|sum|convert|solve|answer|establish|understand"
    r"|consider each|start|begin|know|read|scan|go through|parse|recall|note down|sort|count|derive|estimate|analy[sz]e)"
)
_ORDER = r"(?:first|firstly|second|secondly|third|thirdly|next|then|finally|lastly|to start|to begin(?: with)?)"

NEITHER = (
    r"\bwait(?:ing|ed)?,? (?:for|until|till|to see|times?|lists?|periods?|staff|a (?:few|minute for|day|week|month|year)|and see)\b",
    r"\b(?:can't|cannot|couldn't|had to|have to|must|should|will|would|to|and|they|he|she|them) wait\b",
    r"\b(?:no need|not necessary|unnecessary|without having|don't need|didn't need|doesn't need|do not need) to (?:double[- ]?)?(?:check|verify|confirm|re-?read|break|find|calculate|compute)\b",
    r"\bwithout (?:checking|verifying|confirming)\b",
    r"\b(?:an?|the|by|his|her|their|its|each|every|background|security|spell|blank|bank|reality|paid|cash(?:ed|ing)?|annual|internal) (?:double )?checks?\b",
    r"\bchecks? (?:for \$|and balances|in the amount|payable|marks?|boxes|points?|lists?|out of)",
    r"\b(?:auditors?|company|companies|they|he|she|management|board|inspectors?|committee|regulators?|who|which|it|was|were|been|be|team)(?: (?:has|have|had|will|would|must|also|then|later|were|was|to|then|not))? (?:verif(?:y|ies|ied)|confirm(?:s|ed)?|check(?:s|ed)?|validated?|reconsider(?:s|ed)?|recalculated?)\b",
    r"\baccording to (?:my|our|me|his|her|plan|some|experts?|critics|legend|schedule\b(?! \d))",
    r"\b(?:if|whether|unless|until|once|in case|assuming) (?:the|this|that) " + _SOURCE + r" " + _STATES,
    r"\bdata (?:shows?|provides|reports?) up\b",
    r"\bwhat (?:the|this|that|each|every) " + _SOURCE + r" (?:says|states|mentions|reports)\b",
    r"\b(?:be|is|are|was|were|been) (?:wrong|mistaken)ly\b",
    r"\bactually,? (?:a|an|the first|quite|very|rather)\b",
    r"\bstep[- ]by[- ]step (?:guide|manual|instructions?)\b",
    r"\b(?:first|second|third|next|final|last) (?:quarter|half|year|month|day|time|place|floor|part|name|edition|lien)\b",
    r"验证码|核实人|检查站|检查官|检查员|支票|不对称|不对等|不对外|等等[。；;]?$|等等[）)、]|重新(?:开业|上市|发行|命名|任命|装修)|应当?(?:检查|验证|核实)",
)

BACKTRACKING = (
    r"^(?:oh|but|hmm+|ah|okay|ok|no|hold on|hm|so|and|well|uh)?[,.… ]{0,3}wait\b",
    r"[,;:—–-] ?(?:but |oh |no,? |hmm,? )?wait\b",
    r"\b(?:but|oh|hmm+|no),? wait\b",
    r"^(?:oh|but|hmm+|ah|so)?[,… ]{0,3}(?:hold on|hang on|scratch that|never ?mind|strike that|on second thought)\b",
    r"\b(?:scratch that|on second thoughts?)\b|^(?:no,? |but )?forget (?:that|it|what i)\b",
    r"\b(?:this|that|which|it) contradicts (?:what (?:i|we)|my|our|the earlier)\b",
    r"\b(?:going with|choosing|picking|using|assuming)\b[^,.;]{0,40} was (?:wrong|a mistake|not right)\b",
    r"^(?:hmm+|oh|ah|well|but)?[,.… ]{0,3}(?:no|nope)[,.]? (?:that|this|it|i|we|the|not)\b",
    r"^(?:hmm+|oh|no|but)?[,.… ]{0,3}actually,? (?:no|not|wait|i|that|this|it|the|we|maybe|let)\b",
    r"\b(?:that|this|which|it) (?:can't be|cannot be|isn't|is not|wasn't|can not be|doesn't (?:seem|look|sound)|does not seem) (?:quite )?(?:right|correct|so)\b",
    r"\b(?:that|this|which|it) (?:is|was|seems|looks|must be) (?:wrong|incorrect|a mistake|an error|mistaken|a dead end)\b",
    r"\bthat's (?:not right|not correct|wrong|incorrect|a mistake|not it|a dead end|not what)\b",
    r"\b(?:i|we) (?:made|must have made|have made|may have made|might have made) (?:a|an|the|some) (?:mistake|error|slip|miscalculation)\b",
    r"\b(?:i|we)(?: must have| may have| might have| have|'ve)? (?:misread|misunderstood|miscalculated|miscounted|mixed up|overlooked|confused|misinterpreted)\b",
    r"\b(?:i|we) (?:was|were) (?:wrong|mistaken|looking at the wrong|using the wrong|confusing)\b",
    r"\b(?:let me|let's|i should|i need to|we should|i'll|i will|i have to|we need to) (?:reconsider|rethink|re-?think|re-?evaluate|revise|backtrack|start over|go back|step back|correct (?:that|this|myself)|try (?:again|another|a different|something else)|back up)\b",
    r"\b(?:try|use|take|think of) (?:another|a different|an alternative) (?:approach|way|method|route|angle|strategy|interpretation|reading)\b",
    r"\b(?:this|that) (?:approach|method|path|route|idea|assumption) (?:doesn't|does not|won't|didn't|isn't|fails|failed|leads nowhere|is wrong)\b",
    r"\bmy (?:mistake|bad|error)\b|\bmy (?:earlier|previous|initial|first) (?:reading|assumption|answer|calculation|interpretation|thought|guess|claim|conclusion) (?:was|is|were) (?:wrong|incorrect|mistaken|off|not)",
    r"\bcorrection:",
    r"^(?:or )?alternatively,? (?:maybe|perhaps|it|the|we|i|this|that|could)\b",
    r"^(?:oh|ah),? i see\b",
    r"^[嗯哦啊，,不但可是]{0,4}(?:等等|等一下|等下|且慢|慢着)(?=[，,。！!…？? ]|$|[我这那不])|[，,](?:等等|等一下|且慢)[，,]",
    r"^(?:嗯|哦|啊|但|可是)?[，,]?(?:不对|不是这样|错了)|[，,](?:不对|错了)[，,。！]?$",
    r"(?:我|我们)(?:刚才|之前|好像|可能|前面)?(?:弄|搞|看|算|理解|读|想|记)错了?|(?:这|那)(?:个|样|种)?(?:思路|方法|结论|计算|答案|假设|理解)?(?:是)?(?:不对|错的|不正确|行不通|有误)",
    r"(?:让我|我|我们)?(?:需要|应该|得|再)?(?:重新(?:考虑|思考|审视|想|来|理解|开始)|换(?:一)?(?:种|个)(?:方法|思路|角度|方式)|推翻)",
)

SUBGOAL_SETTING = (
    rf"\b{_ORDER},? (?:{_WILL}|{_WE}){_SOON} {_DO}\b",
    rf"\b{_ORDER},? (?:{_WILL}|{_WE}){_SOON} {_CHECK}\b",
    rf"^{_ORDER}[,:]? {_DO}\b",
    rf"^{_ORDER}[,:]? {_CHECK}\b",
    rf"\b{_WILL}{_SOON} {_DO}\b(?!(?: at| through| over)? (?:the|this|that|it|these|those)[a-z ]{{0,30}} (?:again|once more|a second time)\b)",
    r"\bstep \d{1,2}\b ?[:.)—–-]",
    r"\b(?:the|my|our) (?:first|next|second|third|last|final) (?:step|task|thing|goal|sub-?goal|sub-?question) (?:is|will be|would be|to)\b",
    r"\b(?:the|my|our) (?:plan|strategy|approach|goal|sub-?goal)(?: here| now)? (?:is|will be|would be) to\b|^(?:here's |here is )?(?:the|my|our) plan:",
    r"\b(?:break|split|decompose|divide) (?:this|it|the (?:question|problem|task|calculation)|things) (?:down|up|into)\b",
    r"\bto (?:answer|solve|find|get|do|determine|work out|compute|calculate|figure)\b[^,;:\n]{0,60}, ?(?:i|we|you) (?:first )?(?:need|must|have to|should|will|can)\b",
    r"\b(?:i|we)(?:'ll| will|'d better| would| first| now| also)? need (?:two|three|four|both|the|all|some|a)\b",
    r"\b(?:i|we)(?:'d better| had better| should) (?:start|begin)\b",
    r"\b(?:what|all) (?:i|we) need (?:first |now |next |to find )?(?:is|are)\b",
    r"\bsub-?(?:question|problem|goal|task) ?\d",
    r"\b(?:i'm|i am|we're|we are) (?:trying|going|about) to (?:find|figure out|determine|work out|answer|identify|understand|see|compute|calculate)\b",
    r"\b(?:now,? )?mov(?:e|ing) on to (?:the|step|part|question)\b|^now (?:for|on to) (?:the|step|part)\b",
    rf"\b(?:let me|let's) (?:see|find out) (?:what|where|who|when|which|how|whether|if)(?: {_THE} {_SOURCE} {_STATES})?\b",
    r"^(?:首先|第一步|第二步|第三步|第四步|接下来|接着|其次|然后|最后|下一步)[，,：:]?(?:我|我们|需要|让我|要|应该|得|先|来|找|计算|确定|查|看|比较|分析)",
    r"(?:我|我们)(?:现在)?(?:需要|得|要|应该|可以)?(?:首先|先|接下来|下一步)(?:需要|要|得|来)?(?:找|计算|确定|查|看|比较|分析|算|列|弄清|理清|了解|明确|读)",
    r"(?:把|将)(?:这个|该|这道)?(?:问题|题目|任务)(?:分解|拆分|拆解|分成|分为)|分(?:成|为)?[一二三四五两几\d]{1,2}(?:个)?步|步骤[一二三四五\d]",
    r"(?:要|为了)(?:回答|解决|求|得到|计算)[^，,。\n]{0,30}[，,](?:我|我们)?(?:需要|要|得|必须|首先)",
)

VERIFICATION = (
    rf"\b{_WILL}{_SOON} {_CHECK}\b",
    rf"^(?:to |just to )?{_CHECK}(?:ing)?\b(?! (?:that )?(?:the )?box)",
    rf"\b(?:just )?to (?:be (?:sure|safe|certain)|{_CHECK})\b",
    r"\b(?:double|cross)[- ]?check(?:ing)?\b",
    r"\b(?:so |and )?(?:that's|that is|this is|it's) (?:confirmed|verified|consistent)\b",
    r"\b(?:think about|see|consider|ask myself) (?:whether|if) (?:the|this|that|it|these|those)[a-z ]{0,30} (?:is|are|was|were|makes?) (?:consistent|right|correct|sense|plausible)\b",
    r"^(?:verifying|checking|confirming|re-?checking)\b",
    r"\b(?:this|that|it|which|the (?:result|answer|sum|total|number)s?|the numbers|both|they|these|everything)(?: also| indeed| all)? (?:match(?:es)?|agrees?|adds? up|checks? out|tall(?:y|ies)|lines? up)\b",
    r"\b(?:is|seems|looks|appears|are)(?: also| indeed)? (?:consistent with|the same as (?:the|what|in))\b",
    r"\b(?:is|are|was|does) (?:that|this|it) (?:right|correct|consistent|make sense|match|add up|agree)\b",
    r"\b(?:does|do) (?:that|this|it|these|the numbers) (?:make sense|match|add up|agree|hold|check out)\b",
    r"\b(?:as a|one more|another|a quick|quick) (?:sanity |final |cross-)?check\b",
    r"\bplug(?:ging)? (?:it|this|that|these|the (?:value|number|answer)s?) back\b",
    r"\b(?:look(?:ing)?(?: back)? at|read(?:ing)?|go(?:ing)? (?:over|through)|add(?:ing)?|count(?:ing)?|comput(?:e|ing)|calculat(?:e|ing))"
    r" (?:it|this|that|(?:the|this|that|these|those)[a-z ]{1,30})? ?(?:again|once more|a second time)\b",
    r"(?:让我|我|我们|来)?(?:再|再次|重新|需要|应该|得)?(?:检查|验证|核实|核对|确认|复核|验算)(?:一下|一遍|一次|下|这|是否|结果|答案|计算|：|:)",
    r"(?:再|重新)(?:看|算|读|数|计算|检查|核对|确认)(?:一|了一)?(?:遍|次|下)|(?:让我|我)(?:再|再次|重新)(?:确认|检查|验证|核实|核对|计算)",
    r"(?:这|结果|答案|数字)(?:个|也|都)?(?:与|和|跟)[^，,。\n]{1,20}(?:一致|吻合|相符|符合)",
)

GROUNDING = (
    rf"\b(?:according to|per|based on|as per|quoting|citing|as) (?:{_ANY_SOURCE}|(?:note|table|page|section|item) {QUOTE}|what {_THE} {_SOURCE})",
    rf"\b{_ANY_SOURCE}(?: \d{{1,4}})?(?: (?:on|of|about|for|from|below|above|provided|given|by)\b[a-z ]{{0,30}})?(?: (?:also|clearly|explicitly|itself|further|then|only|specifically))? {_STATES}\b",
    rf"^(?:so |and |now |well,? |also,? |okay,? |then )?(?:in|on|from|under) {_ANY_SOURCE}\b",
    rf"^(?:so |and |now |well,? |okay,? |then )?{_LOOK} {_ANY_SOURCE}\b",
    rf"\b(?:i|we)(?: can)?(?: also)? (?:see|read|find|found|saw|noticed?|get) (?:in|on|from|under) {_ANY_SOURCE}\b",
    rf"\b(?:it|this|that)(?:'s| is| was) (?:also |clearly |explicitly )?{_STATED} (?:in {_ANY_SOURCE}|that|here|on {_ANY_SOURCE})",
    rf"\bas {_STATED} (?:in|on|by|above|earlier)\b",
    rf"\b(?:it|here it|there it) (?:also |clearly |explicitly )?(?:says|states|reads|mentions) ?(?:that|here|:|,|{QUOTE})",
    rf"\b{_STATED} (?:in|on) {_ANY_SOURCE}\b",
    r"(?:根据|依据|按照|从)(?:这篇|这份|该|上述|以上|给定的?|所给的?|提供的?|原|本|第[一二三四五六七八九十\d]{1,3}[段页节章条](?:的|中的?)?)?(?:文本|文件|文章|文档|报告|原文|上文|材料|表格?|资料|文中|合同|年报|财报|数据|信息|段落|内容|描述|内容)",
    r"(?:文本|文件|文章|文档|报告|原文|上文|材料|表格?|资料|合同|年报|财报|段落|第[一二三四五六七八九十\d]{1,3}[段页节章条])(?:的)?(?:中|里|上|内|开头|结尾|末尾)?(?:也|还|明确|清楚地?)?(?:提到|提及|指出|写道?|说|显示|称|记载|表明|披露|描述|列出)",
    r"文中(?:也|还|明确)?(?:提到|提及|指出|写道?|说|显示|称|表明|描述)|在(?:文中|原文|文档中|报告中|表[格中\d])",
)

_GROUPS = {
    "neither": NEITHER,
    "backtracking": BACKTRACKING,
    "subgoal_setting": SUBGOAL_SETTING,
    "verification": VERIFICATION,
    "grounding": GROUNDING,
}

# Where a cue can begin: tried first, since most of a text's positions are inside a word.
_MAY_BEGIN = r"(?:^|(?<![a-z0-9'])(?=[a-z])|(?=[,;:—–\-\u3001-\u9fff，]))"

PATTERN = re.compile(
    _MAY_BEGIN + "(?:" + "|".join(f"(?P<{name}>{'|'.join(cues)})" for name, cues in _GROUPS.items()) + ")"
)
"""All cues, of lower-case text."""
