"""The closed lexicon of the synthetic reports: every name, figure and sentence a document can contain.

Each entry is one word, so that the demo's tokenizer gives it one token and a model of a million parameters can copy a
fact in one step. The lists are disjoint: a word tells its kind, and nothing else.
"""

from __future__ import annotations

COMPANIES = tuple(
    "Acme Borealis Cobalt Delmar Everly Fabrikon Gravona Halden Ironside Juniper Kestrel Lumina Meridian Norwood Orbis "
    "Pinnacle Quarry Redwood Solara Tamarack Umbria Vantage Westfall Xenon Yarrow Zephyr Altair Brightwater Cascade "
    "Dunmore Elmwood Foxglove Granite Hawthorn Indigo Jasper Kingsley Larkspur Monarch Nimbus".split()
)
METRICS = tuple("revenue profit debt equity payroll inventory goodwill cash".split())
PEOPLE = tuple(
    "Abbot Baker Castillo Drummond Eriksen Farrell Gupta Hoffman Ivanov Jansen Kimura Lopez Moreau Nakata Okafor "
    "Petrov Quinn Rossi Schmidt Tanaka Ueda Varga Wagner Xu Yilmaz Zhang Andrade Bishop Chandra Dupont Fischer Greco "
    "Horvath Ibrahim Jensen Kovacs Lindgren Mbeki Novak Osman".split()
)
CITIES = tuple(
    "Athens Bergen Cairo Dublin Essen Florence Geneva Hamburg Istanbul Jakarta Kyoto Lisbon Madrid Nairobi Oslo Porto "
    "Quito Riga Seville Tallinn Utrecht Vienna Warsaw Zagreb Antwerp Bilbao Cologne Dakar Edinburgh Ghent Helsinki "
    "Krakow Leeds Malmo Naples Odense Prague Rotterdam Salzburg Turin".split()
)
SUPPLIERS = tuple(
    "Ardent Bastion Calder Dynamo Emblem Falcon Garnet Harbor Insignia Jubilee Keystone Lantern Magnet Nexus Octave "
    "Pioneer Quantum Ranger Sentinel Trident Unity Vector Whistler Yonder Zenith Anchor Beacon Compass Drift Element "
    "Forge Gateway Horizon Impact Junction Krypton Legacy Mosaic Nucleus Outpost".split()
)
LOWEST, HIGHEST = 100, 499
"""Figures are drawn from LOWEST..HIGHEST (millions), so that the sum of two still has three digits: one token."""

RELATIONS = {
    "chief": ("Director", "chief", PEOPLE),
    "seat": ("City", "home", CITIES),
    "supplier": ("Vendor", "supplier", SUPPLIERS),
}
"""Name of a link -> (word before the linked name, what it is to the company, the names it can have)."""

SECTIONS = ("Letter to shareholders", "Segment table", "Notes to the accounts")
TITLE = "Annual report of the group"
TABLE_HEAD = "\n | item | company | amount |"

FILLERS = tuple(
    sentence.strip()
    for sentence in """
    The board thanks all employees for another year of steady work.
    Demand was uneven in the first half and better in the second half.
    Please read the following text together with the notes and the table.
    All amounts are in millions and follow the format of the last report.
    Therefore, the outlook for the coming year remains cautious.
    We opened new offices and closed older ones below the expected cost.
    Which markets will grow is a question that nobody can answer today.
    The auditor has read the accounts and has no remarks.
    Interest rates, energy prices and wages were higher than a year ago.
    What was planned as a short project became a long one.
    Your response to our last letter was encouraging.
    We insert here a word of thanks to our customers.
    The companies of the group share research, training and transport.
    Risks are reviewed each quarter, or more often when markets move.
    Two plants were modernised, and a third will follow as soon as possible.
    The figures in the table and in the notes are the same figures.
    Deliveries were late in spring because of storms and strikes.
    No member of the board holds an office outside the group.
    The difference between plan and result was small in most regions.
    The sum of many small steps made the group more resilient.
    """.strip().splitlines()
)
"""Sentences that carry no fact. Between them they use the words of the question template, so that the tokenizer, which
is built from documents alone, knows those words too."""
COMPANY_FILLERS = tuple(
    sentence.strip()
    for sentence in """
    The staff of {company} were busy all year.
    The customers of {company} asked for shorter delivery times.
    A new warehouse of {company} opened in autumn.
    The plans of {company} were approved by the board.
    Analysts follow {company} with growing interest.
    The workshop of {company} was extended as planned.
    """.strip().splitlines()
)
"""Distractors that name a company without giving any of its facts."""
